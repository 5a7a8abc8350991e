"""What a training step holds at once, against Swin-T, by the books of PyTorch's allocator."""

import itertools

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

import l2vit  # noqa: F401


def peak_bytes(name: str, *, checkpointing: bool = False) -> int:
    """Activations and gradients of a step at its peak; weights and images are there before."""
    model = timm.create_model(name).train()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(8, 3, 224, 224)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as books:
        model(images).square().mean().backward()
    events = books.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.slow
def test_a_step_holds_little_more_than_swins_and_half_of_it_with_checkpointing():
    swin = peak_bytes("swin_tiny_patch4_window7_224")
    assert peak_bytes("l2vit_tiny") < 1.2 * swin
    assert peak_bytes("l2vit_tiny", checkpointing=True) < 0.5 * swin
