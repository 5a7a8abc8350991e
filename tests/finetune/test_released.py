"""Files that networks' authors released go through the same commands as our own runs."""

import argparse
import json

import pytest
import timm
import torch
from digit_models import make_model, write_checkpoint

from finetune import evaluate, export_timm
from l2vit.errors import UserError
from l2vit.train.config import InitConfig
from l2vit.train.transfer import load_initial
from l2vit.train.weights import read_pretrained


def inline_deit(classes=12):
    torch.manual_seed(3)
    return timm.create_model("inline_deit_tiny", num_classes=classes, img_size=64).eval()


def released_deit(path, model):
    """As its authors save it: their names, training state beside."""
    weights = {k.replace("attn.core.", "attn."): v for k, v in model.state_dict().items()}
    torch.save({"model": weights, "epoch": 299, "max_accuracy": 74.5}, path)
    return path


def released_l2vit(path, model, *, size=48, window=6):
    """Under the key names of spec/model.md, typed here from there."""
    theirs = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")
        if name.startswith("stem.layers"):
            key = f"downsample_layers.0.proj.proj.{'.'.join(part[2:])}"
        elif name.startswith("stem.norm"):
            key = f"downsample_layers.0.norm.{part[2]}"
        elif part[2:3] == ["downsample"]:
            kind = {"conv": "proj", "norm": "norm"}[part[3]]
            key = f"downsample_layers.{part[1]}.{kind}.{part[4]}"
        elif part[0] == "stages":
            rest = ".".join(part[4:])
            for ours, released in (
                ("cpe1.conv", "cpe.0.proj"),
                ("cpe2.conv", "cpe.1.proj"),
                ("attn.scale", "attn.temperature"),
                ("lcm_norm", "norm3"),
                ("lcm.norm", "local_mp.bn"),
                ("lcm.", "local_mp."),
            ):
                if rest.startswith(ours):
                    rest = released + rest[len(ours) :]
                    break
            key = f"stages.{part[1]}.{part[3]}.{rest}"
        else:
            key = name.replace("head.fc.", "head.")
        theirs[key] = tensor
    settings = argparse.Namespace(input_size=size, window_size=window, lr=1e-3)
    torch.save({"model": theirs, "args": settings}, path)
    return path


def test_the_l2vit_authors_file_needs_no_name(tmp_path, model, folders, same_process):
    file = released_l2vit(tmp_path / "authors.pth", model)
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(file), "--out", str(out), "--images", str(folders)]
    assert export_timm.main([*arguments, "--proof-images", "20"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "l2vit_mini"
    assert (config["model_args"]["window_size"], config["model_args"]["img_size"]) == (6, 48)
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(("choice", "expected"), [("auto", "ema"), ("raw", "raw"), ("ema", "ema")])
def test_the_certificate_says_which_weights_were_taken(
    tmp_path, model, folders, same_process, choice, expected
):
    file, out = released_l2vit(tmp_path / "authors.pth", model), tmp_path / "out"
    content = torch.load(file, weights_only=False)
    content["model_ema"] = dict(content["model"]) | {"head.bias": content["model"]["head.bias"] + 1}
    torch.save(content, file)
    arguments = ["--checkpoint", str(file), "--out", str(out), "--images", str(folders)]
    assert export_timm.main([*arguments, "--weights", choice, "--proof-images", "2"]) == 0
    assert json.loads((out / "certificate.json").read_text())["weights"] == expected
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    difference = (again.get_classifier().bias - model.get_classifier().bias).detach()
    assert difference.allclose(torch.full_like(difference, float(expected == "ema")))


def test_the_l2vit_authors_file_begins_a_fine_tuning(tmp_path, model):
    file = released_l2vit(tmp_path / "authors.pth", model)
    target = timm.create_model("l2vit_mini", num_classes=3, window_size=12)
    init = InitConfig(source=str(file))
    report = load_initial(target, init, classes=("a", "b", "c"), class_names=())
    for name, tensor in target.state_dict().items():
        if not name.startswith("head.fc"):
            assert torch.equal(tensor, model.state_dict()[name])
    assert "authors.pth" in report.summary() and "no class is shared" in report.head


def test_released_tables_of_this_size_are_taken_as_they_are(tmp_path):
    """Not by way of the size that the name stands for (224)."""
    model = inline_deit()
    with torch.no_grad():
        model.pos_embed.normal_()
    file = released_deit(tmp_path / "inline.pth", model)
    target = timm.create_model("inline_deit_tiny", num_classes=3, img_size=64)
    init = InitConfig(source=str(file))
    report = load_initial(target, init, classes=("a", "b", "c"), class_names=())
    assert torch.equal(target.pos_embed, model.pos_embed)
    assert "resized" not in report.summary()


def test_inline_file_is_exported_with_proof(tmp_path, capfd):
    model = inline_deit()
    file = released_deit(tmp_path / "inline.pth", model)
    out = tmp_path / "out"
    flags = ["--model", "inline_deit_tiny", "--input-size", "64"]
    assert export_timm.main(["--checkpoint", str(file), "--out", str(out), *flags]) == 0
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_mode"] == "squash"
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    card = (out / "README.md").read_text()
    assert "does not name its 12 classes" in card
    assert "64×64, whole picture squashed to 73×73, centre crop, bicubic" in card
    proof = json.loads((out / "certificate.json").read_text())["timm"]
    assert proof["images"] == proof["same_first_answer"] == 10


def test_an_exported_file_takes_another_size_and_says_what_it_resized(
    tmp_path, capfd, same_process
):
    model = inline_deit()
    file = released_deit(tmp_path / "inline.pth", model)
    out, larger = str(tmp_path / "out"), tmp_path / "larger"
    flags = ["--model", "inline_deit_tiny", "--input-size", "64"]
    assert export_timm.main(["--checkpoint", str(file), "--out", out, *flags]) == 0
    capfd.readouterr()
    arguments = ["--checkpoint", out, "--out", str(larger), "--input-size", "96"]
    assert export_timm.main(arguments) == 0
    assert "resized pos_embed from 17 to 37 rows" in capfd.readouterr().err
    again = timm.create_model(f"local-dir:{larger}", pretrained=True).eval()
    model.set_input_size(96)
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), model(images))


def test_a_size_the_network_cannot_take_is_refused_in_one_line(tmp_path, capfd):
    model = timm.create_model("flatten_swin_mini", num_classes=10, img_size=64, window_size=4)
    write_checkpoint(tmp_path / "run", model, name="flatten_swin_mini", size=64, window=4)
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert export_timm.main([*arguments, "--input-size", "96"]) == 1
    error = capfd.readouterr().err.strip()
    assert error.count("\n") == 0 and "window of 4 does not divide the grid (6, 6)" in error


def test_a_released_file_is_evaluated_by_name(tmp_path, folders):
    file = released_deit(tmp_path / "inline.pth", inline_deit(classes=10))
    figures = tmp_path / "figures.json"
    flags = ["--name", "inline_deit_tiny", "--input-size", "64", "--threads", "0"]
    arguments = ["--model", str(file), "--data", str(folders), "--json", str(figures)]
    assert evaluate.main([*arguments, *flags]) == 0
    assert json.loads(figures.read_text())["count"] == 120


def test_a_thousand_outputs_are_imagenets(tmp_path):
    file = released_deit(tmp_path / "inline.pth", inline_deit(classes=1000))
    source = read_pretrained(file, model="inline_deit_tiny", input_size=64)
    assert source.classes[0] == "n01440764" and source.classes[850] == "n04399382"
    assert source.class_names[850].startswith("teddy")
    assert "sorted wnids" in source.note


def test_other_files_are_refused_in_one_line(tmp_path, capfd):
    notes = tmp_path / "notes.txt"
    notes.write_text("not a checkpoint")
    for flags in ([], ["--model", "inline_deit_tiny"]):
        arguments = ["--checkpoint", str(notes), "--out", str(tmp_path / "o"), *flags]
        assert export_timm.main(arguments) == 1
        error = capfd.readouterr().err.strip()
        assert error.count("\n") == 0 and "notes.txt" in error
    arguments = ["--checkpoint", str(notes), "--out", str(tmp_path / "o"), "--model", "inline_diet"]
    assert export_timm.main(arguments) == 1
    assert "timm knows no model 'inline_diet'; like it: inline_deit" in capfd.readouterr().err
    file = tmp_path / "l2vit.pth"
    torch.save({"model": make_model().state_dict()}, file)
    try:
        read_pretrained(file, model="inline_deit_tiny")
    except UserError as error:
        assert "inline_deit_tiny" in str(error)
    else:
        raise AssertionError("another network's file was accepted")
