"""Swin hosts with ``dynamic``: any size in windows as trained, padded with zeros."""

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer

from l2vit.models.families.swin import Swin

SMALL = {"embed_dims": (16, 32, 64, 128), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def swin(**arguments):
    torch.manual_seed(0)
    model = Swin(num_classes=5, **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("size", [(224, 224), (448, 448)])
def test_where_windows_divide_the_maps_it_is_timms_swin(size):
    """timm's own takes other sizes with ``strict_img_size=False``."""
    ours = swin(dynamic=True)
    theirs = SwinTransformer(
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        num_classes=5,
        strict_img_size=False,
    ).eval()
    state = {}
    for name, value in ours.state_dict().items():
        name = name.replace("stem.conv", "patch_embed.proj").replace(
            "stem.norm", "patch_embed.norm"
        )
        name = name.replace("stages.", "layers.").replace(
            "attn.core.bias.relative", "attn.relative"
        )
        state[name] = value
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    if size != (224, 224):
        theirs.set_input_size(img_size=size, window_size=(7, 7))
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_at_the_trained_size_it_is_the_model_as_trained():
    kind = {"types": "LLSS", "attention": "focused"}
    fixed, dynamic = swin(**kind), swin(dynamic=True, **kind)
    dynamic.load_state_dict(fixed.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(images), fixed(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="224"):
        fixed(torch.randn(1, 3, 256, 224))


@pytest.mark.parametrize(("stage", "window"), [(0, 56), (2, 7)])
def test_a_map_of_any_size_is_cut_into_zero_padded_windows(stage, window):
    """A plain loop: each window alone through the same layer, what is padded cut off."""
    model = swin(dynamic=True, types="LLSS", attention="focused")
    attention = model.stages[stage].blocks[0].attn
    height, width = window + 3, 2 * window - 5
    x = torch.randn(1, height, width, SMALL["embed_dims"][stage])
    expected = torch.zeros_like(x)
    with torch.no_grad():
        found = attention(x, x)
        for top in range(0, height, window):
            for left in range(0, width, window):
                part = x[:, top : top + window, left : left + window]
                padded = torch.zeros(1, window, window, x.shape[3])
                padded[:, : part.shape[1], : part.shape[2]] = part
                answer = attention(padded, padded)[:, : part.shape[1], : part.shape[2]]
                expected[:, top : top + window, left : left + window] = answer
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_registered_models_take_detection_sizes():
    model = timm.create_model(
        "flatten_swin_tiny", features_only=True, dynamic=True, depths=(1, 1, 1, 1)
    )
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 100, 130))
    assert [tuple(x.shape[-2:]) for x in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]
