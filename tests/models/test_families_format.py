"""Released files of FLatten and InLine: synthetic ones under the released names leave the export as
timm models that compute what a plain float64 transcription computes from the same file."""

import sys
import types

import families_reference as reference
import pytest
import timm
import torch

import l2vit  # noqa: F401
from finetune import export_timm
from l2vit.errors import UserError
from l2vit.models.convert import read_released

MINI = {"dims": (32, 64, 128, 256), "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8)}
PVT = {"dims": (64, 128, 320, 512), "depths": (2, 2, 2, 2)}
NETWORKS = {
    "flatten_swin_mini": reference.Network(
        "swin", "focused", types="LLSS", size=96, window=3, **MINI
    ),
    "inline_swin_mini": reference.Network(
        "swin", "injective", types="LLLS", size=64, window=7, **MINI
    ),
    "flatten_pvt_tiny": reference.Network(
        "pvt", "focused", types="LLLL", size=64, heads=(1, 2, 5, 8), **PVT
    ),
    "inline_pvt_tiny": reference.Network(
        "pvt", "injective", types="LLLL", size=64, heads=(2, 4, 10, 16), **PVT
    ),
    "flatten_pvt_v2_b0": reference.Network(
        "pvt_v2", "focused", (32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8), "LLLL", 64
    ),
    "flatten_cswin_tiny": reference.Network(
        "cswin", "focused", (64, 128, 256, 512), (2, 4, 18, 1), (2, 4, 8, 16), "LLSS", 64, window=2
    ),
    "inline_cswin_tiny": reference.Network(
        "cswin", "injective", (64, 128, 256, 512), (2, 4, 18, 1), (2, 4, 8, 16), "LLSS", 64
    ),
    "inline_deit_tiny": reference.Network("deit", "injective", (192,), (12,), (6,), "L", 64),
}


def save(path, weights, **others):
    torch.save({"model": weights, **others}, path)
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_equals_transcription(name, tmp_path, same_process):
    """The released file through the command, then as timm loads what it left."""
    net = NETWORKS[name]
    weights = reference.released_weights(net)
    file, out = save(tmp_path / "released.pth", weights), tmp_path / "out"
    flags = {"--checkpoint": file, "--model": name, "--out": out, "--proof-images": 1}
    flags |= {"--input-size": net.size, "--window-size": net.window}
    assert export_timm.main([str(part) for pair in flags.items() for part in pair]) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True).double().eval()
    images = torch.randn(2, 3, net.size, net.size, dtype=torch.float64)
    with torch.no_grad():
        answers = model(images)
    expected = torch.stack([reference.logits(net, image, weights) for image in images])
    assert expected.std() > 1e-2  # the network does something
    torch.testing.assert_close(answers, expected, rtol=1e-8, atol=1e-9)


@pytest.fixture(scope="module")
def mini():
    """A small released file's weights and what they are."""
    net = reference.Network("swin", "focused", types="LLSS", size=32, window=4, **MINI)
    return net, reference.released_weights(net)


def convert(path, **wishes):
    return read_released(path, "flatten_swin_mini", input_size=32, window_size=4, **wishes)


def test_every_container(mini, tmp_path):
    _, weights = mini
    averaged = {key: value + 1 for key, value in weights.items()}
    buffers = {
        "layers.2.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "layers.3.blocks.0.attn.relative_position_index": torch.zeros(1, 1, dtype=torch.int64),
    }
    parallel = {f"module.{key}": value for key, value in {**weights, **buffers}.items()}
    both = tmp_path / "both.pth"
    torch.save({"model": parallel, "state_dict_ema": averaged, "max_accuracy_e": 80.0}, both)
    flat = tmp_path / "flat.pth"
    torch.save(weights, flat)

    raw, ema, auto = convert(both, ema=False), convert(both, ema=True), convert(both)
    assert (raw.which, ema.which, auto.which) == ("raw", "ema", "ema")
    for key, value in convert(flat).weights.items():
        assert torch.equal(raw.weights[key], value)
        assert torch.equal(ema.weights[key], value + 1)
    assert any("dropped 2 index tables and masks" in line for line in raw.report)
    with pytest.raises(UserError, match="no model_ema or state_dict_ema"):
        convert(flat, ema=True)


def test_settings_of_the_training_program_are_read_past(mini, tmp_path, monkeypatch):
    """Real files carry a yacs CfgNode: reading needs neither yacs nor trust."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        node = CfgNode(MODEL=CfgNode(NAME="flatten"))
        node.__dict__["__immutable__"] = True
        save(tmp_path / "cfg.pth", mini[1], config=node, epoch=299, max_accuracy=82.1)
    assert convert(tmp_path / "cfg.pth").weights


class Evil:
    def __reduce__(self):
        return (print, ("run by the unpickler",))


def test_files_that_do_not_fit_are_refused(mini, tmp_path, capsys):
    _, weights = mini
    file = tmp_path / "file.pth"

    def message(change, **others):
        changed = dict(weights)
        change(changed)
        save(file, changed, **others)
        with pytest.raises(UserError) as caught:
            convert(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "missing (stages.0.blocks.1.attn.core.scale)" in message(
        lambda w: w.pop("layers.0.blocks.1.attn.scale")
    )
    assert "unknown (absolute_pos_embed)" in message(
        lambda w: w.update(absolute_pos_embed=torch.zeros(1))
    )
    wrong = torch.zeros(5, 1, 5, 5)
    shapes = "stages.0.blocks.0.attn.core.dwc.weight: 5x1x5x5, not 32x1x5x5"
    assert f"of other shape ({shapes})" in message(
        lambda w: w.update({"layers.0.blocks.0.attn.dwc.weight": wrong})
    )
    assert "no square grid" in message(
        lambda w: w.update({"layers.0.blocks.0.attn.positional_encoding": torch.zeros(1, 62, 32)})
    )
    assert "asks for print, which weights do not need" in message(lambda w: None, config=Evil())
    assert "run by the unpickler" not in capsys.readouterr().out
    with pytest.raises(UserError, match="timm knows no model 'swin_tiny'"):
        read_released(file, "swin_tiny")
    with pytest.raises(UserError, match="checkpoint not found"):
        read_released(tmp_path / "absent.pth", "flatten_swin_mini")


def test_unused_norm_is_dropped_by_name_and_only_in_flatten_pvt(tmp_path):
    net = NETWORKS["flatten_pvt_tiny"]
    weights = reference.released_weights(net)
    extra = {"norm.weight": torch.full((512,), 7.0), "norm.bias": torch.ones(512)}
    file = save(tmp_path / "pvt.pth", {**weights, **extra})
    found = read_released(file, "flatten_pvt_tiny", input_size=64)
    assert [line.split(":")[0] for line in found.report[1:]] == [
        "dropped norm.weight",
        "dropped norm.bias",
    ]
    inline = NETWORKS["inline_pvt_tiny"]
    save(file, {**reference.released_weights(inline), **extra})
    with pytest.raises(UserError, match=r"unknown \(norm\.weight, norm\.bias\)"):
        read_released(file, "inline_pvt_tiny", input_size=64)


def bicubic(picture, size):
    """(H, W) resized by the textbook bicubic kernel (a = −0.75), edges repeated, no antialias."""

    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    old = len(picture)
    matrix = torch.zeros(size, old, dtype=torch.float64)
    for i in range(size):
        at = (i + 0.5) * old / size - 0.5
        base = int(at // 1)
        for tap in range(base - 1, base + 3):
            matrix[i, min(max(tap, 0), old - 1)] += kernel(at - tap)
    return matrix @ picture.double() @ matrix.T


def test_another_input_size_resizes_the_tables(mini, tmp_path):
    _, weights = mini
    file = save(tmp_path / "small.pth", weights)
    found = read_released(file, "flatten_swin_mini", input_size=64, window_size=8)
    assert sum("resized" in line for line in found.report) == 2 * 2 + 2 * 2
    encoding = weights["layers.1.blocks.0.attn.positional_encoding"]  # 4×4 -> 8×8
    ours = found.weights["stages.1.blocks.0.attn.core.positional_encoding"]
    for channel in (0, 63):
        expected = bicubic(encoding[0, :, channel].view(4, 4), 8)
        torch.testing.assert_close(
            ours[0, :, channel].double().view(8, 8), expected, rtol=0, atol=1e-6
        )
    bias = weights["layers.2.blocks.0.attn.relative_position_bias_table"]  # window 2 -> 4
    ours = found.weights["stages.2.blocks.0.attn.core.bias.relative_position_bias_table"]
    expected = bicubic(bias[:, 3].view(3, 3), 7)
    torch.testing.assert_close(ours[:, 3].double().view(7, 7), expected, rtol=0, atol=1e-6)

    deit = NETWORKS["inline_deit_tiny"]
    weights = reference.released_weights(deit)
    found = read_released(save(file, weights), "inline_deit_tiny", input_size=96)
    table = found.weights["pos_embed"]
    assert torch.equal(table[:, 0], weights["pos_embed"][:, 0])  # the class token's row
    expected = bicubic(weights["pos_embed"][0, 1:, 5].view(4, 4), 6)
    torch.testing.assert_close(table[0, 1:, 5].double().view(6, 6), expected, rtol=0, atol=1e-6)
