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
    pictures = re.findall(r"base64,([^\"]+)", text)
    assert len(pictures) == 4 * 3  # the most that divide the batch; host, DALI, mixed
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p))), int) for p in pictures]
    assert decoded[0].shape == (32, 32, 3)
    for host, dali in zip(decoded[0::3], decoded[1::3], strict=True):
        assert np.abs(host - dali).mean() < 1.5
    mixed = [
        np.abs(host - both).max() for host, both in zip(decoded[::3], decoded[2::3], strict=True)
    ]
    assert min(mixed) > 30
    for sample in map(int, re.findall(r"<br>sample (\d+)", text)):
        assert f"n{shards.labels[sample]:08d}<br>sample {sample}" in text


@pytest.mark.parametrize(
    "extra, count, told",
    [
        (["--images", "1"], 2 * 3, "Mean difference"),
        (["augment.mixup=0", "augment.cutmix=0", "--images", "1"], 3, "Mean difference"),
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
