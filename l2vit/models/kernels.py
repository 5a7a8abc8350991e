"""The old place of the switch of the Triton kernels, kept for those who import it from here."""

from l2vit.models.ops import use_triton as use

__all__ = ["use"]
