"""Which stages pad, against grids worked out by hand."""

import timm
import torch

import l2vit  # noqa: F401
from l2vit.models.padding import fitting_windows, padding_of, padding_warnings


def shapes(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def found(model, size):
    return [(stage.stage, stage.grid, stage.padded) for stage in padding_of(model, size)]


def test_l2vit_at_the_papers_sizes():
    assert padding_of(shapes("l2vit_tiny"), 224) == []
    assert padding_of(shapes("l2vit_tiny", window_size=12), 384) == []
    assert padding_of(shapes("l2vit_tiny", window_size=8), 256) == []


def test_l2vit_at_a_size_that_does_not_fit():
    """384 pixels: grids of 96, 48, 24 and 12 in windows of 7."""
    model = shapes("l2vit_tiny")
    assert found(model, 384) == [
        (1, (96, 96), (98, 98)),
        (2, (48, 48), (49, 49)),
        (3, (24, 24), (28, 28)),
        (4, (12, 12), (14, 14)),
    ]
    line = padding_warnings(model, 384)[3]
    assert "stage 4's 12x12 grid at input 384: padded to 14x14, 27%" in line


def test_any_number_of_stages():
    """75 pixels: 19, then 10, then 5."""
    model = shapes("l2vit_mini", depths=(2, 2, 2), window_size=5)
    assert found(model, 75) == [(1, (19, 19), (20, 20))]
    assert [stage.stage for stage in padding_of(shapes("l2vit_mini", depths=(2, 2)), 75)] == [1, 2]


def test_other_networks():
    """timm's Swin pads likewise if it may take another size; ours takes only its own."""
    swin = shapes("swin_tiny_patch4_window7_224", img_size=256, window_size=7)
    assert [stage.stage for stage in padding_of(swin, 256)] == [1, 2, 3, 4]
    assert padding_of(shapes("inline_swin_tiny"), 224) == []
    assert padding_of(shapes("inline_swin_tiny"), 384) == []
    assert padding_of(shapes("resnet18"), 100) == []


def test_the_model_itself_is_left_alone():
    model = timm.create_model("l2vit_mini", depths=(2, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fitting_windows(model, 224) == [2, 4, 7, 14]
    assert model.training and model.window_size == 7
    torch.testing.assert_close(model.state_dict(), before)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
