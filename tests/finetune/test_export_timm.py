import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from digit_models import NAMES, WINDOW, WNIDS, digit_jpegs, make_model, write_checkpoint
from PIL import Image

from finetune import export, export_timm, verification
from l2vit.errors import UserError
from l2vit.train import checkpoint, history, report
from l2vit.train.run_record import RunRecord
from l2vit.train.weights import read_pretrained

FRESH = """
import sys, json, io, glob
import l2vit, timm, torch
from PIL import Image
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
cfg = timm.data.resolve_model_data_config(model)
show = timm.data.create_transform(**cfg, is_training=False)
out = {}
for path in sorted(glob.glob(sys.argv[2] + "/*/*")):
    with torch.inference_mode():
        out[path] = model(show(Image.open(path).convert("RGB"))[None])[0].tolist()
print(json.dumps({"logits": out, "labels": model.pretrained_cfg["label_names"],
    "config": {k: cfg[k] for k in ("input_size", "crop_pct", "crop_mode", "interpolation")}}))
"""


def test_a_timm_user_gets_the_trained_model(exported, model, folders):
    """The exported directory in a process of its own against the model in memory and PIL."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(exported), str(folders)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["labels"] == list(WNIDS)
    assert found["config"]["input_size"] == [3, 48, 48]
    assert (found["config"]["crop_pct"], found["config"]["crop_mode"]) == (1.0, "squash")
    assert found["config"]["interpolation"] == "bicubic"
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    for path, logits in found["logits"].items():
        picture = Image.open(path).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            expected = model(((pixels - mean) / std)[None])[0]
        assert torch.allclose(torch.tensor(logits), expected, atol=2e-5)


def test_what_the_directory_holds(exported, run, model):
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"] == "l2vit_mini"
    assert config["model_args"]["window_size"] == WINDOW
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 10
    labels = dict(zip(WNIDS, NAMES, strict=True))
    assert config["pretrained_cfg"]["label_descriptions"] == labels
    saved = safetensors.torch.load_file(exported / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items())
    certificate = json.loads((exported / "certificate.json").read_text())
    for name, digest in certificate["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert set(certificate["sha256"]) == {"model.safetensors", "config.json", "README.md"}
    proof = certificate["timm"]
    assert proof["images"] == proof["same_first_answer"] == proof["labelled_images"] == 64
    assert proof["top1_right_trained"] == proof["top1_right_exported"]
    assert proof["largest_logit_difference"] <= proof["tolerance"]
    card = (exported / "README.md").read_text()
    for text in (
        "library_name: timm",
        "m" * 64,
        "0123abc",
        "val/top1_percent 50",
        "Limits",
        "local-dir:",
    ):
        assert text in card
    assert not list(exported.parent.glob("*.tmp")) and not list(exported.parent.glob("*.old"))


def test_reading_the_export_back_gives_the_same_source(exported, run):
    first, again = read_pretrained(run), read_pretrained(exported)
    assert (again.model, again.model_args, again.classes) == (
        first.model,
        first.model_args,
        first.classes,
    )
    assert again.preprocessing == first.preprocessing and again.which == "raw"
    assert again.class_names == NAMES


def test_refused_where_the_exported_model_differs(run, tmp_path, monkeypatch, capfd):
    """A configuration with another window rebuilds, loads, and is another function."""
    write = export.write_model

    def wrong(directory, source, model):
        write(directory, source, model)
        config = json.loads((directory / "config.json").read_text())
        config["model_args"]["window_size"] = 3
        (directory / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(export, "write_model", wrong)
    out = tmp_path / "out"
    assert export_timm.main(["--checkpoint", str(run), "--out", str(out)]) == 1
    assert "logits differ" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refused_where_the_weights_differ_a_little(exported, run, same_process):
    source = read_pretrained(run)
    samples, _ = export.proof_samples(source, None, 4)
    changed = make_model()
    with torch.no_grad():
        changed.head.fc.bias[3] += 1e-3
    with pytest.raises(UserError, match="logits differ by"):
        verification.prove(exported, source, changed, samples)


def test_earlier_export_is_replaced_other_directories_are_not(run, tmp_path, capfd, same_process):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run), "--out", str(out), "--proof-images", "2"]
    assert export_timm.main(arguments) == 0
    assert export_timm.main(arguments) == 0
    assert json.loads((out / "certificate.json").read_text())["timm"]["images"] == 2
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert export_timm.main(["--checkpoint", str(run), "--out", str(other)]) == 1
    assert "choose another --out" in capfd.readouterr().err
    assert (other / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("world", [1, 3])
def test_ema_and_raw_weights_of_any_number_of_parts(tmp_path, world, shards, same_process):
    """ZeRO leaves each tensor in runs over the ranks' parts, cut anywhere."""
    raw, average = make_model(seed=1), make_model(seed=2)
    run = tmp_path / "run"
    write_checkpoint(run, raw, ema=average.state_dict(), world=world, val=shards)
    for flags, expected in (
        ([], average),
        (["--ema"], average),
        (["--weights", "raw"], raw),
    ):
        out = tmp_path / "out"
        assert (
            export_timm.main(
                ["--checkpoint", str(run), "--out", str(out), "--proof-images", "1", *flags]
            )
            == 0
        )
        saved = safetensors.torch.load_file(out / "model.safetensors")
        for name, parameter in expected.named_parameters():
            assert torch.equal(saved[name], parameter), name
        for name, buffer in raw.named_buffers():
            assert torch.equal(saved[name], buffer), name


def test_a_running_run_gives_its_last_complete_checkpoint(tmp_path, model, shards, same_process):
    run = tmp_path / "run"
    write_checkpoint(run, model, step=5, val=shards)
    newer = make_model(seed=3)
    torn = write_checkpoint(run, newer, step=6, val=shards)
    (torn / checkpoint.META_NAME).unlink()
    out = tmp_path / "out"
    assert (
        export_timm.main(["--checkpoint", str(run), "--out", str(out), "--proof-images", "1"]) == 0
    )
    assert json.loads((out / "certificate.json").read_text())["step"] == 5


def test_a_checkpoint_pruned_while_it_was_read_is_read_again(tmp_path, model, monkeypatch):
    run = tmp_path / "run"
    old = write_checkpoint(run, model, step=5)
    real = checkpoint.read_weights

    def pruned_meanwhile(directory, which="auto"):
        if directory == old:
            write_checkpoint(run, make_model(seed=4), step=6)
            checkpoint.remove(old)
        return real(directory, which)

    monkeypatch.setattr(checkpoint, "read_weights", pruned_meanwhile)
    assert read_pretrained(run).training["step"] == 6


def test_no_ema_is_said(run, tmp_path, capfd):
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path / "o"), "--ema"]
    assert export_timm.main(arguments) == 1
    assert "EMA" in capfd.readouterr().err


def test_without_shards_the_embedded_photographs_serve(tmp_path, model, same_process):
    run, out = tmp_path / "run", tmp_path / "out"
    write_checkpoint(run, model, val=tmp_path / "gone")
    assert export_timm.main(["--checkpoint", str(run), "--out", str(out)]) == 0
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["timm"]["images"] == 10 and "scikit-learn" in certificate["pictures"]


def test_window_and_size_may_change_at_export(run, tmp_path, model, capfd, same_process):
    out = tmp_path / "out"
    flags = ["--window-size", "2", "--input-size", "64", "--proof-images", "2"]
    assert export_timm.main(["--checkpoint", str(run), "--out", str(out), *flags]) == 0
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert tuple(again.pretrained_cfg["input_size"]) == (3, 64, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        model.set_input_size(window_size=2)
        expected = model(images)
        model.set_input_size(window_size=WINDOW)
        assert torch.equal(again(images), expected)
    assert "padded" not in capfd.readouterr().err
    card = (out / "README.md").read_text()
    assert "input size 48 in training, 64 here; window 6 in training, 2 here" in card
    assert "--window-size 2 --input-size 64" in card


def test_onnx_and_torch_export_and_whole_accuracy(run, tmp_path, shards, model, same_process):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    flags = ["--onnx", "--torch-export", "--evaluate", str(shards), "--proof-images", "3"]
    assert export_timm.main(["--checkpoint", str(run), "--out", str(out), *flags]) == 0
    images = torch.randn(5, 3, 48, 48)  # another batch size than was traced
    with torch.inference_mode():
        expected = model(images)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    (answers,) = session.run(["logits"], {"images": images.numpy()})
    assert np.abs(answers - expected.numpy()).max() < 1e-4
    program = torch.export.load(out / "model.pt2").module()
    assert (program(images) - expected).abs().max() < 1e-4
    full = json.loads((out / "certificate.json").read_text())["evaluation"]
    assert full["count"] == 120 and full["top1_right"] == full["top1_right_trained"]
    with torch.inference_mode():
        right = 0
        show = timm.data.create_transform(
            (3, 48, 48), crop_pct=1.0, crop_mode="squash", interpolation="bicubic"
        )
        import io

        for data, digit in digit_jpegs(120):
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            right += int(model(show(picture)[None]).argmax()) == digit
    assert full["top1_right"] == right
    assert f"{right:,} right" in (out / "README.md").read_text()


def test_what_timm_itself_saves_is_read(tmp_path):
    """Since 1.0.31 it writes the number of classes among the arguments."""
    model = timm.create_model("l2vit_mini", num_classes=5).eval()
    model.set_input_size(64, window_size=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {"window_size": 4, "num_classes": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = read_pretrained(tmp_path)
    assert source.model_args == {"window_size": 4} and source.num_classes == 5
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(source.build()(images), model(images))


@pytest.mark.parametrize("given", ["", "checkpoints/step-00000008"])
def test_the_runs_report_tells_of_its_export(given, tmp_path):
    history.append(tmp_path, "start", step=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "images": 64, "time": 1, "loss": 2.0}\n')
    export.note_in_run(SimpleNamespace(path=tmp_path / given, which="ema"), Path("exports/mine"))
    page = report.page(RunRecord.load(tmp_path))
    assert "exports/mine (ema weights)" in page and "exported to exports/mine" in page
