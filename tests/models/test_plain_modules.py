"""Hooks, pruning, LoRA, FLOP counters and torch.func see plain PyTorch layers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import l2vit  # noqa: F401
from l2vit.models.count import count_macs

LAYERS = nn.Linear | nn.Conv2d


def small(**arguments):
    torch.manual_seed(0)
    return timm.create_model("l2vit_mini", depths=(2, 2), num_classes=5, **arguments)


def by_torch(layer, x):
    """What a linear layer or a convolution makes of ``x``."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def injective_swin():
    torch.manual_seed(0)
    sizes = {"embed_dims": (32, 64), "depths": (2, 2), "num_heads": (1, 2), "mlp_ratios": (4, 4)}
    return timm.create_model("inline_swin_mini", types="IS", img_size=64, window_size=4, **sizes)


def focused_pvt():
    torch.manual_seed(0)
    sizes = {"embed_dims": (32, 64), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (4, 4)}
    return timm.create_model("flatten_pvt_tiny", types="LL", img_size=64, **sizes)


@pytest.mark.parametrize("make", [small, injective_swin])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_see_every_layers_own_output(make, training, grad):
    """No layer is stepped past or adds a residual."""
    model = make().train(training)
    images, seen, handles = torch.randn(2, 3, 64, 64), {}, []

    def look(module, inputs, output):
        assert module not in seen
        seen[module] = (inputs[0], output)

    with torch.set_grad_enabled(grad):
        expected = model(images)
        for part, module in model.named_modules():
            if isinstance(module, LAYERS) or part.endswith((".attn", ".mlp")):
                handles.append(module.register_forward_hook(look))
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    for part, module in model.named_modules():
        if isinstance(module, LAYERS):
            x, output = seen[module]
            torch.testing.assert_close(output, by_torch(module, x), rtol=1e-3, atol=1e-5, msg=part)
        elif part.endswith(".mlp"):
            torch.testing.assert_close(seen[module][1], seen[module.fc2][1])
        elif part.endswith(".attn") and make is small:
            x, output = seen[module]
            torch.testing.assert_close(output, module(x), rtol=1e-3, atol=1e-5, msg=part)


@pytest.mark.parametrize("make", [small, focused_pvt])
def test_pruned_layers_are_those_of_the_last_update(make):
    """PyTorch's pruning masks weights in a hook before each call."""
    model, images = make().eval(), torch.randn(2, 3, 64, 64)
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        model(images)
        for layer in layers:
            layer.weight_orig.mul_(3)
        pruned = model(images)
        for layer in layers:
            prune.remove(layer, "weight")
        torch.testing.assert_close(model(images), pruned)


class Adapted(nn.Module):
    """A layer in the place of another, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(a, b, bias=False) for a, b in self.sides(base))

    @staticmethod
    def sides(base):
        return (base.in_features, 2), (2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        with torch.no_grad():
            self.base.weight += self.up.weight @ self.down.weight
        return self.base


@pytest.mark.parametrize("grad", [True, False])
def test_linear_layers_can_be_replaced(grad):
    model, images = small().eval(), torch.randn(2, 3, 64, 64)

    def replace(kind, change):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, kind) and not isinstance(module, Adapted):
                    setattr(module, name, change(child))

    replace(nn.Linear, Adapted)
    with torch.set_grad_enabled(grad):
        adapted = model(images)
        replace(Adapted, Adapted.merged)
        torch.testing.assert_close(model(images), adapted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_flops_are_counted_on_a_cpu(grad):
    model = small().eval()
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.randn(3, 3, 64, 64))
    assert counter.get_total_flops() == 3 * 2 * count_macs(model, 64)


def test_gradients_by_torch_func():
    model, images = small().eval(), torch.randn(2, 3, 64, 64)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters):
        out = torch.func.functional_call(model, (parameters, buffers), (images,))
        return out.square().sum()

    found = torch.func.grad(loss)(parameters)
    model(images).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
