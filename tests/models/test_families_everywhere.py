"""Every attention in every backbone: gradients, precision, compilers and exports."""

import pytest
import torch
from test_families import BACKBONES, small

ATTENTIONS = ("softmax", "focused", "injective", "enhanced")
EVERYWHERE = [
    (backbone, attention) for backbone in (*BACKBONES, "deit") for attention in ATTENTIONS
]
IN_CI = {  # every backbone and every attention; the rest is slow
    *(("pvt", "injective"), ("pvt_v2", "focused"), ("swin", "softmax")),
    *(("cswin", "enhanced"), ("deit", "injective")),
}


def lively(backbone, attention, size=64):
    """A small network in float64 whose every tensor matters."""
    model = small(backbone, attention, size=size).double().train()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("backbone", "attention"),
    [
        pytest.param(*pair, marks=() if pair in IN_CI else pytest.mark.slow, id="-".join(pair))
        for pair in EVERYWHERE
    ],
)
def test_gradients_of_the_whole_network_in_float64(backbone, attention):
    """With respect to the image and every parameter, against finite differences."""
    model = lively(backbone, attention, size=32)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    inputs = (image, *model.parameters())
    assert torch.autograd.gradcheck(
        lambda image, *_: model(image), inputs, fast_mode=True, eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize(("backbone", "attention"), EVERYWHERE)
def test_single_precision_takes_the_same_steps(backbone, attention):
    """On CPUs fp32 goes through fused layers; float64 through plain ones."""
    exact, single = lively(backbone, attention), lively(backbone, attention)
    single.load_state_dict(exact.state_dict())
    single.float()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = exact(images)
    expected.square().mean().backward()
    found = single(images.float())
    found.square().mean().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    for (name, got), wanted in zip(single.named_parameters(), exact.parameters(), strict=True):
        apart = (got.grad.double() - wanted.grad).norm()
        assert apart <= 1e-3 * wanted.grad.norm() + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "attention"), EVERYWHERE)
def test_compiles_for_training_and_exports(backbone, attention):
    model = small(backbone, attention).train()
    images = torch.randn(2, 3, 64, 64)
    model(images).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-4, msg=name)
    model.eval()
    any_batch = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(model, (images,), dynamic_shapes=any_batch).module()
    with torch.no_grad():
        for count in (1, 3):
            more = torch.randn(count, 3, 64, 64)
            torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
