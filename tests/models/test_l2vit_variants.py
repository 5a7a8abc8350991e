"""timm's generic model tests, for every name and with every argument of L²ViT, made small."""

import warnings

import pytest
import timm
import torch
from timm.models import save_for_hf

import l2vit  # noqa: F401
from l2vit.models.export import export_any_size
from l2vit.models.registry import SIZES, VARIANTS

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
        ({"window_size": 0}, "window_size 0 is not a positive whole number"),
        ({"window_size": (7, 7)}, "window_size (7, 7) is not a positive whole number"),
    ],
)
def test_arguments_that_make_no_network_are_refused(arguments, message):
    """A misspelt kind must not build the network of another row."""
    with pytest.raises(ValueError) as caught:
        small("l2vit_tiny", **arguments)
    assert message in str(caught.value)


def test_a_window_of_nothing_is_refused_later_too():
    model = small("l2vit_mini")
    with pytest.raises(ValueError, match="window_size 0 is not a positive"):
        model.set_input_size(window_size=0)


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


@pytest.mark.parametrize("name", ["l2vit_tiny_plus", "l2vit_mini"])
def test_a_pruned_model_takes_a_new_head(name):
    """Two stages of two blocks, cut to one; timm's contract from 1.0.31 on."""
    model, images = small(name).eval(), torch.randn(2, 3, 41, 33)
    (first,) = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert model.prune_intermediate_layers([0], prune_head=False) == [0]
    assert (model.num_features, model.head_hidden_size) == (32, 32)
    torch.testing.assert_close(model(images).permute(0, 3, 1, 2), first)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images), first.mean((2, 3)))
    model.reset_classifier(4, "catavgmax")
    assert model(images).shape == (2, 4) and model.head_hidden_size == 64
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 64)


def test_is_made_where_and_in_what_precision_timm_is_asked_to():
    for name in ("l2vit_mini", "inline_swin_mini"):
        model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
        assert all(b.is_meta and b.dtype != torch.bfloat16 for b in model.buffers())
        model.reset_classifier(0)
        model.reset_classifier(3)
        weight = model.get_classifier().weight
        assert weight.is_meta and weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "arguments", "change", "data"),
    [
        ("l2vit_mini", {}, {"img_size": (64, 96), "window_size": 4}, None),
        ("l2vit_mini", {"window_size": 3}, {"img_size": 96}, {"input_size": (3, 96, 96)}),
        ("l2vit_mini", {}, {}, {"input_size": (3, 256, 256)}),
        ("l2vit_base.in22k_ft_in1k_384", {"embed_dim": 32, "depths": (2,)}, {}, None),
        ("inline_swin_mini", {}, {"img_size": 128, "window_size": 4}, None),
    ],
)
def test_what_timm_saves_is_what_it_loads(name, arguments, change, data, tmp_path):
    """Also the window, which no tensor shows: with another one the answers are others."""
    pytest.importorskip("timm.models._input", reason="this timm saves no arguments")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    if change:
        model.set_input_size(**change)
    save_for_hf(model, tmp_path, data_config=data)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, *model.img_size)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
