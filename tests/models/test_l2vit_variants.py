"""timm's generic model tests, for every name and with every argument of L²ViT, made small."""

import warnings

import pytest
import timm
import torch

import l2vit  # noqa: F401
from l2vit.models.registry import SIZES, VARIANTS
from l2vit.models.tracing import export_any_size

NAMES = [*SIZES, *VARIANTS]
SMALL = {"embed_dim": 32, "depths": (2, 2), "num_classes": 7}


def small(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **arguments})


@pytest.mark.parametrize("name", NAMES)
def test_learns_from_every_parameter(name):
    model = small(name, drop_rate=0.1, drop_path_rate=0.1, img_size=40, window_size=3)
    out = model(torch.randn(4, 3, 41, 33))
    assert out.shape == (4, 7) and out.isfinite().all()
    out.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_classifier(name):
    model, images = small(name).eval(), torch.randn(2, 3, 41, 33)
    extractor = small(name, features_only=True, out_indices=(0, 1)).eval()
    assert not extractor.model.load_state_dict(model.state_dict(), strict=False).missing_keys
    final, stages = model.forward_intermediates(images)
    for got, expected, info in zip(extractor(images), stages, extractor.feature_info, strict=True):
        torch.testing.assert_close(got, expected)
        assert got.shape[1] == info["num_chs"]
        assert got.shape[2:] == tuple(-(-side // info["reduction"]) for side in (41, 33))
    logits = model(images)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), logits)
    torch.testing.assert_close(model.forward_head(final), logits)
    pooled = model.forward_head(final, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), logits)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.set_input_size((64, 96), window_size=5)
    assert model(images).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_traces_and_exports(name):
    model, images = small(name).eval(), torch.randn(2, 3, 41, 33)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(images)
        forms = [
            torch.compile(model, backend="aot_eager", fullgraph=True),
            torch.jit.trace(model, images),
            torch.export.export(model, (images,)).module(),
            export_any_size(model, torch.randn(2, 3, 75, 64)).module(check_guards=False),
        ]
        for form in forms:
            torch.testing.assert_close(form(images), expected, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "con"}, "stem 'con' is none of conv, conv4, patch"),
        ({"global_mixer": "lin"}, "global_mixer 'lin' is none of linear, window"),
        ({"mlp": "pvt"}, "mlp 'pvt' is none of plain, pvt2, local"),
        ({"order": "vk"}, "order 'vk' is none of auto, kv, qk"),
        ({"embed_dim": 48}, "embed_dim 48 is no multiple of the head width 32"),
        ({"lcm_kernel": 4}, "lcm_kernel 4 is neither odd nor 0"),
        ({"window_size": 0}, "window_size 0 is not positive"),
    ],
)
def test_arguments_that_make_no_network_are_refused(arguments, message):
    """A misspelt kind must not build the network of another row."""
    with pytest.raises(ValueError) as caught:
        small("l2vit_tiny", **arguments)
    assert message in str(caught.value)


def test_pretrained_weights_adapt_as_timm_promises(tmp_path):
    """Other channels, another classifier, features alone: from one file."""
    source, path = small("l2vit_mini"), tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}
    grey = small("l2vit_mini", in_chans=1, num_classes=4, **given)
    first = source.stem.layers[0].weight
    torch.testing.assert_close(grey.stem.layers[0].weight, first.sum(1, keepdim=True))
    assert grey.get_classifier().weight.shape == (4, 64)
    torch.testing.assert_close(grey.norm.weight, source.norm.weight)
    images = torch.randn(2, 3, 41, 33)
    features = small("l2vit_mini", features_only=True, out_indices=(0, 1), **given).eval()(images)
    expected = source.eval().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(features, expected)
