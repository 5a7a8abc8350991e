"""FLOP counters and quantisers of other libraries see our layers: they know PyTorch's modules."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import l2vit  # noqa: F401

TINY_MACS = (4.3e9, 4.9e9)
"""l2vit_tiny takes 4.69 G; some counters leave attention's products out."""


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model("l2vit_tiny").eval()


def test_deepspeeds_profiler(tiny):
    from deepspeed.profiling.flops_profiler import get_model_profile

    _, macs, parameters = get_model_profile(
        copy.deepcopy(tiny), input_shape=(1, 3, 224, 224), print_profile=False, as_string=False
    )
    assert TINY_MACS[0] < macs < TINY_MACS[1]
    assert parameters == sum(p.numel() for p in tiny.parameters())


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(tiny, backend):
    ptflops = pytest.importorskip("ptflops")
    macs, _ = ptflops.get_model_complexity_info(
        copy.deepcopy(tiny),
        (3, 224, 224),
        as_strings=False,
        print_per_layer_stat=False,
        backend=backend,
    )
    assert TINY_MACS[0] < macs < TINY_MACS[1]


def test_fvcore(tiny):
    fvcore = pytest.importorskip("fvcore.nn")
    counter = fvcore.FlopCountAnalysis(tiny, torch.randn(1, 3, 224, 224))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit.trace, which it uses
        assert TINY_MACS[0] < counter.total() < TINY_MACS[1]


FAMILIES = {
    "l2vit_mini": {"depths": (2, 2)},
    "flatten_swin_mini": {},
    "inline_swin_mini": {},
    "flatten_pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "inline_pvt_tiny": {"depths": (1, 1, 1, 1)},
    "inline_cswin_tiny": {"depths": (1, 1, 1, 1)},
    "inline_deit_tiny": {"depth": 2},
    "deit_tiny_enhanced": {"depth": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchao_int8_weights(name):
    """Every linear layer is taken, and the logits stay near."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, images = timm.create_model(name, **FAMILIES[name]).eval(), torch.randn(2, 3, 224, 224)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kinds = {type(layer.weight) for layer in linear}
    with torch.no_grad():
        expected = model(images)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        got = model(images)
    assert all(type(layer.weight) not in kinds for layer in linear)
    assert 0 < (got - expected).norm() < 0.05 * expected.norm()


def test_quantize_dynamic_reaches_every_linear_layer():
    torch.manual_seed(0)
    model = timm.create_model("l2vit_mini", depths=(2, 2)).eval()
    images = torch.randn(2, 3, 64, 64)
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao's
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    taken = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(taken) == linear
    with torch.no_grad():
        got, expected = quantised(images), model(images)
    assert (got - expected).norm() < 0.1 * expected.norm()
