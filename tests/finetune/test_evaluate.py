import csv
import io
import json
import pkgutil

import numpy as np
import pytest
import timm
import torch
from digit_models import NAMES, WNIDS, digit_jpegs, make_model, write_checkpoint, write_shards
from timm.data import ImageNetInfo, RealLabelsImagenet, create_dataset, create_loader
from timm.utils import accuracy

from finetune import datasets, evaluate
from finetune.scores import Scores
from l2vit.train.weights import read_pretrained


def run_evaluate(tmp_path, model, data, *flags):
    """The program's JSON and its predictions, by image."""
    figures, table = tmp_path / "figures.json", tmp_path / "table.csv"
    arguments = ["--model", str(model), "--data", str(data), "--threads", "0"]
    flags = [*flags, "--json", str(figures), "--predictions", str(table)]
    assert evaluate.main([*arguments, *flags]) == 0
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    return json.loads(figures.read_text()), {row["image"]: row["answer"] for row in rows}


def timm_validate(exported, dataset_name, root, **options):
    """timm's validate.py: its dataset, loader, resolved data configuration and accuracy."""
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    dataset = create_dataset(dataset_name, root=str(root), is_training=False, **options)
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=50,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )
    logits, labels = [], []
    with torch.inference_mode():
        for images, target in loader:
            logits.append(model(images))
            labels.append(target)
    logits, labels = torch.cat(logits), torch.cat(labels)
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    names = dataset.filenames(basename=False) if hasattr(dataset, "filenames") else None
    return float(top1), float(top5), logits.argmax(1).tolist(), names


def test_equals_timm_validate_image_for_image_on_folders(exported, folders, tmp_path):
    figures, answers = run_evaluate(tmp_path, exported, folders)
    top1, top5, expected, names = timm_validate(exported, "", folders)
    assert figures["count"] == 120
    assert figures["top1"] == pytest.approx(top1, abs=1e-4)
    assert figures["top5"] == pytest.approx(top5, abs=1e-4)
    for name, answer in zip(names, expected, strict=True):
        assert answers[name.removeprefix(f"{folders}/")] == WNIDS[answer]


def test_equals_timm_validate_on_its_own_webdataset_reader(exported, shards, tmp_path):
    pytest.importorskip("webdataset")
    figures, answers = run_evaluate(tmp_path, exported, shards)
    top1, top5, expected, _ = timm_validate(
        exported, "wds/digits", shards, split="val", num_samples=120
    )
    assert figures["top1"] == pytest.approx(top1, abs=1e-4)
    assert figures["top5"] == pytest.approx(top5, abs=1e-4)
    assert [WNIDS[answer] for answer in expected] == [answers[f"s{i:05d}"] for i in range(120)]


def test_run_export_and_folders_agree_to_the_image(run, exported, shards, folders, tmp_path, capfd):
    of_run, answers = run_evaluate(tmp_path, run, shards)
    shown = capfd.readouterr()
    of_export, again = run_evaluate(tmp_path, exported, shards)
    _, of_folders = run_evaluate(tmp_path, exported, folders)
    assert answers == again and len(set(answers.values())) >= 3
    by_key = {name.rpartition("/")[2].removesuffix(".jpg"): a for name, a in of_folders.items()}
    assert by_key == answers
    right = sum(answers[f"s{i:05d}"] == WNIDS[digit] for i, (_, digit) in enumerate(digits120()))
    for figures in (of_run, of_export):
        assert (figures["count"], figures["top1_right"]) == (120, right)
    assert f"({right} of 120)" in shown.out and "75% of the positions" in shown.err
    assert sum(entry["right"] for entry in of_run["per_class"]) == right
    assert [entry["name"] for entry in of_run["per_class"]] == list(NAMES)


def digits120():
    return digit_jpegs(120)


def test_picture_is_a_picture(run, shards, tmp_path):
    from PIL import Image

    path = tmp_path / "accuracy.png"
    arguments = ["--model", str(run), "--data", str(shards), "--threads", "0"]
    assert evaluate.main([*arguments, "--picture", str(path)]) == 0
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape == (600, 1500) and pixels.std() > 20


def test_another_size_and_window(run, model, shards, tmp_path, capfd):
    figures, answers = run_evaluate(
        tmp_path, run, shards, "--input-size", "64", "--window-size", "2"
    )
    assert (figures["input_size"], figures["window_size"]) == (64, 2)
    show = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", crop_mode="squash", crop_pct=1.0
    )
    model.set_input_size(window_size=2)
    from PIL import Image

    with torch.inference_mode():
        images = [show(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in digits120()]
        expected = model(torch.stack(images)).argmax(1).tolist()
    model.set_input_size(window_size=6)
    assert [answers[f"s{i:05d}"] for i in range(120)] == [WNIDS[row] for row in expected]
    assert "padded" not in capfd.readouterr().err


def test_a_label_set_inside_the_models_restricts_its_answers(tmp_path, model, digits):
    """Shards of five of the ten classes, and one the model does not know."""
    run, data = tmp_path / "run", tmp_path / "five"
    write_checkpoint(run, model)
    classes = (*WNIDS[5:], "n99999999")
    some = [(jpeg, digit - 5) for jpeg, digit in digits if digit >= 5]
    write_shards(data, [*some, (digits[0][0], 5)], classes)
    figures, answers = run_evaluate(tmp_path, run, data)
    assert figures["count"] == len(some) + 1
    assert set(answers.values()) <= set(WNIDS[5:])
    assert figures["per_class"][-1] == {
        "class": "n99999999",
        "count": 1,
        "right": 0,
        "accuracy": 0.0,
        "name": "",
    }


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (lambda p: p / "nothing", 1, "no such data directory"),
        (lambda p: (p / "empty").mkdir() or p / "empty", 1, "manifest.json"),
        (lambda p: (p / "d" / "n00000001").mkdir(parents=True) or p / "d", 1, "n00000001"),
    ],
)
def test_data_that_cannot_be_used_is_named(run, tmp_path, make, status, words, capfd):
    data = make(tmp_path)
    assert evaluate.main(["--model", str(run), "--data", str(data)]) == status
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert words in error


def test_models_that_cannot_be_used_are_named(tmp_path, shards, capfd):
    for path, words in ((tmp_path / "none", "no such model"), (tmp_path, "no complete checkpoint")):
        assert evaluate.main(["--model", str(path), "--data", str(shards)]) == 1
        assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--json", "/nowhere/a.json"], "no directory /nowhere"),
        (["--device", "meteor"], "--device meteor"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_arguments_are_refused_before_any_work(run, shards, flags, words, capfd):
    assert evaluate.main(["--model", str(run), "--data", str(shards), *flags]) == 2
    error = capfd.readouterr().err.strip()
    assert words in error and error.count("\n") == 0


def imagenet_source(tmp_path, outputs=1000):
    model = make_model(classes=outputs)
    classes = ImageNetInfo("imagenet-1k").label_names()
    write_checkpoint(tmp_path / "run1k", model, classes=classes, names=())
    return tmp_path / "run1k", classes


def test_real_labels_equal_timms(tmp_path, digits):
    """1,000 of the validation set's names against timm's own RealLabelsImagenet on all 50,000."""
    table = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    names = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(50_000)]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50_000, 1000, generator=generator)
    for row, labels in enumerate(table[:2000]):  # some right answers, not always in first place
        if labels:
            logits[row, labels[-1]] += 4.0
    theirs = RealLabelsImagenet([f"{name}.JPEG" for name in names])
    theirs.add_result(logits)
    classes = tuple(ImageNetInfo("imagenet-1k").label_names())
    accepted = datasets._real_labels(datasets.Dataset(tmp_path, classes, None, names))
    ours = Scores(classes, accepted)
    ours.observe(logits, torch.zeros(50_000, dtype=torch.int64), np.arange(50_000))
    found = ours.summary()
    assert found["count"] == sum(bool(labels) for labels in table) == 46_837
    assert found["top1"] == pytest.approx(theirs.get_accuracy(1), abs=1e-9)
    assert found["top5"] == pytest.approx(theirs.get_accuracy(5), abs=1e-9)


def test_imagenet_label_sets_through_timms_tables(tmp_path, digits):
    run, classes = imagenet_source(tmp_path)
    source = read_pretrained(run)
    subset = pkgutil.get_data("timm.data", "_info/imagenet_r_indices.txt").decode().split()
    chosen = [classes[int(i)] for i in subset]
    for label_set, names in (("imagenet-r", chosen[:3]), ("imagenet-v2", ["0", "7", "999"])):
        root = tmp_path / label_set
        for number, name in enumerate(names):
            (root / name).mkdir(parents=True)
            (root / name / "a.jpg").write_bytes(digits[number][0])
        data = datasets.open_dataset(root, source, label_set)
        if label_set == "imagenet-r":
            assert data.columns == tuple(int(i) for i in subset)
            assert [label for _, label in data.images] == [0, 1, 2]
            _, answers = run_evaluate(tmp_path, run, root, "--label-set", label_set)
            assert set(answers.values()) <= set(chosen)
        else:
            assert data.columns is None
            assert [label for _, label in data.images] == [0, 7, 999]


def test_real_on_shards_with_the_validation_sets_names(tmp_path, digits, capfd):
    run, classes = imagenet_source(tmp_path)
    key = "ILSVRC2012_val_{:08d}"
    write_shards(tmp_path / "val", [(data, 1) for data, _ in digits[:9]], classes, key=key)
    table = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    arguments = ["--model", str(run), "--data", str(tmp_path / "val"), "--label-set", "real"]
    assert evaluate.main([*arguments, "--threads", "0"]) == 1  # key 0 is no validation image
    assert "ILSVRC2012_val_00000000" in capfd.readouterr().err
    data = tmp_path / "val2"
    write_shards(data, [(d, 1) for d, _ in digits[:9]], classes, key="ILSVRC2012_val_0000001{}")
    figures, answers = run_evaluate(tmp_path, run, data, "--label-set", "real")
    counted = [number for number in range(9) if table[9 + number]]
    right = sum(
        classes.index(answers[f"ILSVRC2012_val_0000001{n}"]) in table[9 + n] for n in counted
    )
    assert (figures["count"], figures["top1_right"]) == (len(counted), right)


def test_calibration_error_against_a_plain_loop():
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(0, 2, (400, 6)))
    labels = torch.from_numpy(generator.integers(0, 6, 400))
    scores = Scores(tuple("abcdef"))
    for part in range(0, 400, 64):
        ids = np.arange(part, min(part + 64, 400))
        scores.observe(logits[part : part + 64], labels[part : part + 64], ids)
    chances = np.exp(logits.float().numpy().astype(np.float64))
    chances /= chances.sum(1, keepdims=True)
    total = 0.0
    for low in range(15):
        inside = [i for i in range(400) if low / 15 < chances[i].max() <= (low + 1) / 15]
        if inside:
            hits = np.mean([chances[i].argmax() == labels[i].item() for i in inside])
            total += len(inside) / 400 * abs(hits - np.mean([chances[i].max() for i in inside]))
    assert scores.reliability().error == pytest.approx(total, abs=1e-6)


def test_confusion_of_the_worst_classes():
    scores = Scores(("cat", "dog", "cow"))
    answers = [(0, 0), (0, 1), (1, 1), (1, 1), (2, 0), (2, 1), (2, 1), (2, 2)]
    logits = torch.full((8, 3), -1.0)
    for row, (_, answer) in enumerate(answers):
        logits[row, answer] = 1.0
    scores.observe(logits, torch.tensor([label for label, _ in answers]), np.arange(8))
    assert scores.worst(2) == [2, 0]
    shown, matrix = scores.confusion([2, 0], 2)
    assert shown == [2, 0]
    assert matrix.tolist() == [[0.25, 0.25, 0.5], [0.0, 0.5, 0.5]]
