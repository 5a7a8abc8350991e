"""The authors' checkpoints, as the specification lists their keys and shapes."""

import argparse
import os

import pytest
import timm
import torch
from l2vit_reference import MINI, TINY, reference

from l2vit.errors import UserError
from l2vit.models.convert import read_released


def released(path, **content):
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def paper():
    return reference(MINI, window=12, classes=7)


def test_weights_arrive(tmp_path, paper):
    averaged = {key: value + 1 for key, value in paper.state_dict().items()}
    args = argparse.Namespace(window_size=12, input_size=384, lr=1e-3, name=None)
    path = released(
        tmp_path / "l2vit.pth", model=paper.state_dict(), model_ema=averaged, args=args, epoch=3
    )
    found = read_released(path, ema=False)
    assert found.model == "l2vit_mini" and "raw" in found.report[0]
    assert found.model_args == {"window_size": 12, "img_size": 384}
    model = timm.create_model(found.model, num_classes=7, window_size=12).eval()
    model.load_state_dict(found.weights)
    images = torch.randn(1, 3, 100, 70, dtype=torch.float64)
    torch.testing.assert_close(model(images.float()).double(), paper(images), rtol=1e-3, atol=1e-4)
    ema = read_released(path).weights["norm.bias"]
    torch.testing.assert_close(ema, found.weights["norm.bias"] + 1)
    assert read_released(path, window_size=7, input_size=224).model_args["window_size"] == 7


def test_timm_loads_the_file_itself(tmp_path, paper):
    path = released(tmp_path / "l2vit.pth", state_dict=paper.float().state_dict())
    overlay = {"file": str(path), "num_classes": 7}
    model = timm.create_model(
        "l2vit_mini", pretrained=True, pretrained_cfg_overlay=overlay, window_size=12
    )
    torch.testing.assert_close(model.head.fc.weight, paper.head.weight)
    paper.double()


@pytest.mark.parametrize("size", [TINY, (96, (2, 2, 18, 2)), (128, (2, 2, 18, 2))])
@pytest.mark.parametrize("classes", [1000, 21841])
def test_sizes_are_recognised(tmp_path, size, classes):
    """Small files: every tensor is a view of one zero."""
    with torch.device("meta"):
        state = reference.__globals__["transcription"].PaperL2ViT(*size, classes=classes)
        state = state.state_dict()
    zeros = {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()
    }
    found = read_released(released(tmp_path / "x.pth", model=zeros, args=argparse.Namespace()))
    name = {96: {6: "l2vit_tiny", 18: "l2vit_small"}, 128: {18: "l2vit_base"}}[size[0]][size[1][2]]
    assert found.model == name and len(found.weights["head.fc.bias"]) == classes
    assert found.model_args == {"window_size": 7, "img_size": 224}
    assert any("assumed 7" in line for line in found.report)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_what_is_refused(tmp_path, paper, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = paper.state_dict()
    missing = {k: v for k, v in good.items() if k != "stages.2.1.local_mp.bn.weight"}
    cases = [
        ({"model": {**good, "surprise": torch.ones(1)}}, None, "1 unknown (surprise)"),
        ({"model": missing}, None, "1 missing (stages.2.blocks.1.lcm.norm.weight)"),
        (
            {"model": {**good, "norm.bias": torch.ones(3)}},
            None,
            "1 of other shape (norm.bias: 3, not 256)",
        ),
        ({"model": good}, True, "model_ema"),
        ({"model": {"a": torch.ones(1)}}, None, "has no tensor named as in L²ViT's files"),
        ({"model": {"stages.0.0.norm1.weight": torch.ones(7)}}, None, "0 channels, depths [1, 0"),
        ({"model": good, "args": Harm()}, None, "asks for posix.mkdir"),
    ]
    for content, ema, message in cases:
        path = released(tmp_path / "file.pth", **content)
        with pytest.raises(UserError) as caught:
            read_released(path, ema=ema)
        assert message in str(caught.value) and "file.pth" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("text.pth", "absent.pth"):
        with pytest.raises(UserError, match=name):
            read_released(tmp_path / name)
