import json
import math

import pytest
import timm
import torch
from digit_models import NAMES, WNIDS, make_model, write_checkpoint
from timm.data import ImageNetInfo

from l2vit.errors import UserError
from l2vit.train.config import InitConfig
from l2vit.train.transfer import load_initial

WNID_22K = tuple(ImageNetInfo("imagenet-22k").label_names())
WNID_1K = tuple(ImageNetInfo("imagenet-1k").label_names())


def fresh(classes=10, window=6, name="l2vit_mini"):
    torch.manual_seed(99)
    return timm.create_model(name, num_classes=classes, window_size=window)


def head(model):
    return model.get_classifier()


def test_weights_pass_through_bit_for_bit_to_another_size_and_window(run, model):
    target = fresh(window=12)
    report = load_initial(target, InitConfig(source=str(run)), classes=WNIDS, class_names=NAMES)
    before, after = model.state_dict(), target.state_dict()
    assert list(before) == list(after)
    for name in before:
        assert before[name].shape == after[name].shape
        assert torch.equal(before[name], after[name]), name
    assert {t.fate for t in report.tensors} == {"loaded"}
    assert "head kept" in report.head


def test_the_function_after_the_change_is_windows_of_twelve(run, model):
    """LWA with window 12 against softmax attention written out for each 12x12 square."""
    target = fresh(window=12)
    load_initial(target, InitConfig(source=str(run)), classes=WNIDS, class_names=NAMES)
    attention = target.stages[0].blocks[0].attn.double()
    x = torch.randn(1, 24, 36, 32, dtype=torch.float64)
    weight, bias = (
        t.double()
        for t in (
            model.stages[0].blocks[0].attn.qkv.weight,
            model.stages[0].blocks[0].attn.qkv.bias,
        )
    )
    expected = torch.zeros_like(x)
    for top in range(0, 24, 12):
        for left in range(0, 36, 12):
            tokens = x[0, top : top + 12, left : left + 12].reshape(144, 32)
            q, k, v = (tokens @ weight.T + bias).split(32, dim=1)
            scores = torch.exp(q @ k.T / math.sqrt(32))
            out = (scores / scores.sum(1, keepdim=True)) @ v
            expected[0, top : top + 12, left : left + 12] = out.view(12, 12, 32)
    projected = model.stages[0].blocks[0].attn.proj
    expected = expected @ projected.weight.double().T + projected.bias.double()
    with torch.no_grad():
        assert torch.allclose(attention(x), expected, atol=1e-10)


@pytest.mark.parametrize(("size", "window"), [(224, 7), (384, 12)])
def test_the_recipes_sizes_need_no_padding_anywhere(size, window, monkeypatch):
    """Every call of F.pad in a forward of the network is seen: none may add anything."""
    import torch.nn.functional as F

    padded = []
    original = F.pad

    def pad(x, amounts, *args, **kwargs):
        padded.append(amounts)
        return original(x, amounts, *args, **kwargs)

    monkeypatch.setattr(F, "pad", pad)
    with torch.device("meta"):
        network = timm.create_model("l2vit_base", window_size=window).eval()
        network(torch.empty(1, 3, size, size))
        assert not any(any(amounts) for amounts in padded)
        network.set_input_size(window_size=window + 1)
        network(torch.empty(1, 3, size, size))
    assert any(any(amounts) for amounts in padded)  # it would have been seen


def test_22k_head_to_1k_keeps_999_rows_and_says_which_it_lacks(tmp_path):
    """Each row of the 22k head holds its own wnid as a number, so a wrong row shows itself."""
    source = make_model(classes=len(WNID_22K))
    with torch.no_grad():
        for row, wnid in enumerate(WNID_22K):
            head(source).weight[row] = int(wnid[1:]) / 1e7
            head(source).bias[row] = -int(wnid[1:]) / 1e7
    write_checkpoint(tmp_path / "run", source, classes=WNID_22K, names=())
    target = fresh(classes=1000)
    untouched = head(target).weight.clone(), head(target).bias.clone()
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    init = InitConfig(source=str(tmp_path / "run"))
    report = load_initial(target, init, classes=WNID_1K, class_names=names)
    missing = [i for i, wnid in enumerate(WNID_1K) if wnid == "n04399382"]
    assert len(missing) == 1 and report.missing_classes == ("n04399382",)
    for row, wnid in enumerate(WNID_1K):
        if row in missing:
            assert torch.equal(head(target).weight[row], untouched[0][row])
            assert torch.equal(head(target).bias[row], untouched[1][row])
        else:
            expected = torch.full((256,), int(wnid[1:]) / 1e7)
            assert torch.equal(head(target).weight[row], expected)
            assert head(target).bias[row] == -torch.tensor(int(wnid[1:]) / 1e7)
    fates = {t.name: t for t in report.tensors}
    assert fates["head.fc.weight"].fate == fates["head.fc.bias"].fate == "sliced"
    assert "999 rows" in fates["head.fc.weight"].why
    assert "999 of 1000 rows from 21841" in report.head and "teddy" in report.head
    assert fates["stem.layers.0.weight"].fate == "loaded"
    report.save(tmp_path)
    saved = json.loads((tmp_path / "transfer_report.json").read_text())
    assert len(saved["tensors"]) == len(target.state_dict())
    text = (tmp_path / "transfer_report.txt").read_text()
    assert "n04399382" in text and "sliced       head.fc.weight" in text


def test_position_tables_of_another_size_are_resized_and_said(tmp_path):
    """FLatten's encodings: one value per grid place, bicubic, as the authors fine-tune."""
    name = "flatten_swin_mini"
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=10, img_size=64, window_size=2)
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if key.endswith("positional_encoding"):
                parameter.normal_()
    write_checkpoint(tmp_path / "run", source, name=name, size=64, window=2)
    target = timm.create_model(name, num_classes=10, img_size=128, window_size=4)
    init = InitConfig(source=str(tmp_path / "run"))
    report = load_initial(target, init, classes=WNIDS, class_names=NAMES)
    fates = {t.name: t.fate for t in report.tensors}
    key = "stages.0.blocks.0.attn.core.positional_encoding"
    table = source.state_dict()[key]
    side = int(table.shape[1] ** 0.5)
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, size=(2 * side, 2 * side), mode="bicubic")
    expected = larger.permute(0, 2, 3, 1).reshape(1, 4 * side**2, -1)
    assert torch.allclose(target.state_dict()[key], expected, atol=1e-5)
    assert fates[key] == "resized" and fates["head.fc.weight"] == "loaded"
    assert "resized" in report.summary()


def test_reordered_classes_take_their_own_rows(run, model):
    target = fresh()
    order = list(reversed(WNIDS))
    report = load_initial(target, InitConfig(source=str(run)), classes=order, class_names=())
    assert torch.equal(head(target).weight, head(model).weight.flip(0))
    assert report.head.startswith("head sliced")


def test_fresh_head(run, model):
    target = fresh()
    own = head(target).weight.clone()
    init = InitConfig(source=str(run), head="fresh")
    report = load_initial(target, init, classes=WNIDS, class_names=NAMES)
    assert torch.equal(head(target).weight, own)
    fates = [(t.name, t.fate) for t in report.tensors if t.name.startswith("head.fc")]
    assert ("head.fc.weight", "initialised") in fates and ("head.fc.weight", "left out") in fates


def test_other_labels_make_auto_a_fresh_head(run):
    target = fresh(classes=3)
    init = InitConfig(source=str(run))
    report = load_initial(target, init, classes=("cat", "dog", "cow"), class_names=())
    assert "no class is shared" in report.head


def test_scratch_is_said_too():
    target = fresh()
    report = load_initial(target, InitConfig(), classes=WNIDS, class_names=NAMES)
    assert {t.fate for t in report.tensors} == {"initialised"} and "init.source" in report.summary()


def test_ema_is_taken_where_there_is_one(tmp_path, model):
    average = make_model(seed=5)
    write_checkpoint(tmp_path / "run", model, ema=average.state_dict())
    for weights, expected in (("auto", average), ("ema", average), ("raw", model)):
        target = fresh()
        init = InitConfig(source=str(tmp_path / "run"), weights=weights)
        report = load_initial(target, init, classes=WNIDS, class_names=NAMES)
        assert torch.equal(head(target).weight, head(expected).weight)
        assert report.weights == ("raw" if weights == "raw" else "ema")


def test_from_an_exported_directory(exported, model):
    target = fresh()
    load_initial(target, InitConfig(source=str(exported)), classes=WNIDS, class_names=NAMES)
    assert all(
        torch.equal(a, b)
        for a, b in zip(target.state_dict().values(), model.state_dict().values(), strict=True)
    )


def refused(target, source, *words, classes=WNIDS, **init):
    with pytest.raises(UserError) as caught:
        config = InitConfig(source=str(source), **init)
        load_initial(target, config, classes=classes, class_names=())
    for word in (str(source), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused_by_name(run):
    refused(fresh(name="l2vit_tiny"), run, "l2vit_mini", "l2vit_tiny")


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path):
    bare = timm.create_model("l2vit_mini", num_classes=10, lcm_kernel=0)
    write_checkpoint(tmp_path / "bare", bare)
    refused(fresh(), tmp_path / "bare", "missing", "stages.0.blocks.1.lcm")
    write_checkpoint(tmp_path / "whole", fresh())
    refused(bare, tmp_path / "whole", "unknown", "stages.0.blocks.1.lcm")
    small = timm.create_model("l2vit_mini", num_classes=10, lcm_kernel=3)
    write_checkpoint(tmp_path / "small", small)
    refused(fresh(), tmp_path / "small", "32x1x3x3", "32x1x7x7", "lcm.conv1.weight")


def test_wrong_classes_are_refused(run, tmp_path, model):
    refused(fresh(3), run, "init.head=slice", classes=("a", "b", "c"), head="slice")
    refused(fresh(), run, "init.head=keep", "hash", classes=WNIDS[::-1], head="keep")
    path = write_checkpoint(tmp_path / "run", model)
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text.replace(WNIDS[3], "n90000033"))
    refused(fresh(), path, "damaged")
    refused(fresh(), tmp_path / "run", "no complete checkpoint")
    refused(fresh(), tmp_path / "nothing", "no such model")


def test_a_damaged_part_is_refused(tmp_path, model):
    path = write_checkpoint(tmp_path / "run", model)
    part = next(path.glob("part-*"))
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=part.name):
        load_initial(
            fresh(), InitConfig(source=str(tmp_path / "run")), classes=WNIDS, class_names=NAMES
        )
