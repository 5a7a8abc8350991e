"""Fused Triton kernels for GPUs. Triton itself is imported when a CUDA tensor first asks."""

from l2vit.models.kernels.choice import chosen, use

__all__ = ["chosen", "use"]
