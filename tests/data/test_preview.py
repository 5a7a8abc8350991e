"""The preview shows the pictures of both backends and says what they are."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from l2vit.data import contact_sheet
from l2vit.data.config import IMAGENET_MEAN, IMAGENET_STD
from pretrain import preview


def test_page(shards, tmp_path, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"run: {{dir: {tmp_path}, seed: 3}}\nmodel: {{name: l2vit_mini}}\n"
        f"schedule: {{global_batch: 16}}\ndata: {{train: {shards.directory}, input_size: 32}}\n"
    )
    out = tmp_path / "page.html"
    assert preview.main(["--config", str(settings), "--out", str(out), "--images", "6"]) == 0
    text = out.read_text()
    pictures = re.findall(r"image/png;base64,([^\"]+)", text)
    assert len(pictures) == 4 * 3  # the most that divide the batch; host, DALI, mixed
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p))), int) for p in pictures]
    assert decoded[0].shape == (32, 32, 3)
    for host, dali in zip(decoded[0::3], decoded[1::3], strict=True):
        assert np.abs(host - dali).mean() < 1.5
    mixed = [
        np.abs(host - both).max() for host, both in zip(decoded[::3], decoded[2::3], strict=True)
    ]
    assert min(mixed) > 30
    heads = re.findall(r"<h2>\d+\. (\S+)</h2><p class=.quiet.>sample (\d+)", text)
    assert len(heads) == 4
    assert all(f"n{shards.labels[int(sample)]:08d}" == label for label, sample in heads)


def pixels(part):
    """The pictures of a piece of HTML, in order: source, PIL, DALI, mixed."""
    found = re.findall(r"image/\w+;base64,([^\"]+)", part)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(p))), float) for p in found]


@pytest.mark.parametrize("strength", ["augment.cutmix=0", "augment.mixup=0"])
def test_what_is_said_of_a_picture_is_what_was_done(strength, shards, tmp_path):
    """The crop and the mixture, made again from the words with PIL and plain arithmetic."""
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"run: {{dir: {tmp_path}}}\nmodel: {{name: l2vit_mini}}\n"
        f"schedule: {{global_batch: 16}}\ndata: {{train: {shards.directory}, input_size: 64}}\n"
        "augment: {auto_augment: '', erase_prob: 0.0, label_smoothing: 0.0}\n"
    )
    out = tmp_path / "page.html"
    assert preview.main(["--config", str(settings), "--out", str(out), strength]) == 0
    cards = re.findall(r"<section.*?</section>", out.read_text())
    assert len(cards) == 16
    stages = [pixels(card) for card in cards]
    for card, (source, plain, _, mixed) in zip(cards, stages, strict=True):
        words = re.search(r"(\d+)×(\d+) at \((\d+), (\d+)\) of (\d+)×(\d+)", card)
        width, height, left, top, whole, tall = map(int, words.groups())
        assert "operations</th><td>flipped<" in card or "operations</th><td>none<" in card
        if source.shape[:2] == (tall, whole):  # not reduced for the page
            crop = Image.fromarray(source.astype(np.uint8))
            crop = crop.resize((64, 64), 3, (left, top, left + width, top + height))
            expected = np.asarray(crop, float)
            expected = expected[:, ::-1] if "flipped" in card else expected
            assert np.abs(expected - plain).mean() < 8  # the source is shown as JPEG
        partner, share = re.search(r"#place(\d+)\D.*?: ([\d.]+)% of the mixture", card).groups()
        share, other = float(share) / 100, stages[int(partner)][1]
        if "cutmix, " in card:
            box = re.search(r"cutmix, (\d+)×(\d+) at \((\d+), (\d+)\)", card)
            width, height, left, top = map(int, box.groups())
            made = plain.copy()
            area = (slice(top, top + height), slice(left, left + width))
            made[area] = other[area]
            assert width * height / 64**2 == pytest.approx(share, abs=6e-4)
        else:
            made = (1 - share) * plain + share * other
        assert np.abs(made - mixed).max() < 1.5
        targets = sorted(map(float, re.findall(r" (\d\.\d{3})(?=<)", card.split("target")[1])))
        same = len(set(re.findall(r"n\d{8}", card))) == 1
        assert targets[-1] == pytest.approx(1 if same else max(share, 1 - share), abs=6e-4)


@pytest.mark.parametrize(
    "extra, count, told",
    [
        (["--images", "1"], 2 * 3, "Mean difference"),
        (["augment.mixup=0", "augment.cutmix=0", "--images", "1"], 2, "Mean difference"),
        (["data.stream=pipe:cat {directory}/{{shard}}", "data.backend=host"], 16 * 2, "no streams"),
    ],
)
def test_any_number_and_streams(shards, tmp_path, extra, count, told, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"run: {{dir: {tmp_path}}}\nmodel: {{name: l2vit_mini}}\n"
        f"schedule: {{global_batch: 16}}\ndata: {{train: {shards.directory}, input_size: 32}}\n"
    )
    out = tmp_path / "new" / "page.html"
    arguments = [text.format(directory=shards.directory) for text in extra]
    assert preview.main(["--config", str(settings), "--out", str(out), *arguments]) == 0
    text = out.read_text()
    assert text.count("<img") == count and told in text
    assert preview.main(["--config", str(settings), "--out", str(out), "--images", "0"]) == 2
    assert "cannot show 0 of a step of 16" in capsys.readouterr().err


def test_pixels_come_back():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(
        contact_sheet.to_bytes(images, IMAGENET_MEAN, IMAGENET_STD), pixels
    )
    sheet = contact_sheet.contact_sheet(pixels, columns=3)
    assert sheet.shape == (8, 18, 3)
    np.testing.assert_array_equal(sheet[4:, 6:12], pixels[4])
    assert not sheet[4:, 12:].any()


def test_the_former_command_still_works():
    command = [sys.executable, "-m", "l2vit.data.preview", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "python -m pretrain preview" in run.stdout
