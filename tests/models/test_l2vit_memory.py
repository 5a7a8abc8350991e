"""What a training step holds at once, against Swin-T, by the books of PyTorch's allocator."""

from functools import partial

import l2vit_reference  # noqa: F401  the benchmark finds the transcription loaded
import pytest
import torch

from benchmarks.model import OURS, PEER, build, peak_bytes, step


def peak(name: str, *, checkpointing: bool = False) -> int:
    """Activations and gradients of a step at its peak; weights and images are there before."""
    model = build(name, "cpu", torch.float32).train()
    model.set_grad_checkpointing(checkpointing)
    return peak_bytes(partial(step, model, torch.randn(8, 3, 224, 224)), "cpu")


@pytest.mark.slow
def test_a_step_holds_little_more_than_swins_and_less_than_half_with_checkpointing():
    swin, ours = peak(PEER), peak(OURS)
    assert ours < 1.25 * swin
    assert peak(OURS, checkpointing=True) < 0.5 * ours
