"""Networks cast as the engine casts them, against the same networks in fp32."""

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from small_net import TIMM_MODELS

from l2vit.train import precision


def statistics(model):
    return {n: b for n, b in model.named_buffers() if "running" in n}


@pytest.mark.parametrize("name", [*TIMM_MODELS, "l2vit_mini"])
def test_a_cast_network_follows_fp32(name):
    torch.manual_seed(0)
    arguments = {**TIMM_MODELS.get(name, {}), "num_classes": 5}
    if name.startswith(("swin", "vit")):
        arguments["img_size"] = 64
    wide = timm.create_model(name, **arguments).train()
    half = copy.deepcopy(wide)
    precision.cast(half, torch.bfloat16)
    images = torch.randn(8, 3, 64, 64)
    outputs, gradients = {}, {}
    for model, dtype in ((wide, torch.float32), (half, torch.bfloat16)):
        for _ in range(2):
            output = model(images.to(dtype))
        assert output.dtype == dtype
        output.float().square().mean().backward()
        outputs[dtype] = output.float()
        gradients[dtype] = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    expected, found = outputs.values()
    assert torch.cosine_similarity(expected.flatten(), found.flatten(), 0) > 0.99
    assert torch.cosine_similarity(*gradients.values(), 0) > 0.9
    found, expected = statistics(half), statistics(wide)
    for key, buffer in found.items():
        assert buffer.dtype == torch.float32, "bf16 statistics would not move"
        scale = expected[key.replace("running_mean", "running_var")].norm()
        scale = scale**0.5 if "mean" in key else scale
        assert (buffer - expected[key]).norm() < 0.05 * scale, key
    evaluated = half.eval()(images.bfloat16())
    assert evaluated.dtype == torch.bfloat16 and evaluated.isfinite().all()


def test_weights_of_a_norm_are_back_after_each_pass():
    """Their own type and identity: the optimizer and ZeRO know them by it."""
    norm = torch.nn.BatchNorm2d(3)
    before = dict(norm.named_parameters())
    precision.cast(norm, torch.bfloat16)
    norm(torch.randn(2, 3, 4, 4).bfloat16()).sum().backward()
    assert all(p is before[n] and p.dtype == torch.bfloat16 for n, p in norm.named_parameters())
    assert norm.bias.grad.dtype == torch.bfloat16 and norm.bias.grad.tolist() == [32.0] * 3
    with pytest.raises(RuntimeError):
        norm(torch.randn(2, 4, 4, 4).bfloat16())
    assert all(p is before[n] for n, p in norm.named_parameters())
