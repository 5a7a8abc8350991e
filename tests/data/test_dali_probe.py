"""The trial of region decode in a process that may die, and what replaces it."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("nvidia.dali")

from l2vit.data import dali_probe
from l2vit.data.dali import build_graph

CRASH = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
FAIL = [sys.executable, "-c", "raise SystemExit('no such device')"]


def by(monkeypatch, command, **options):
    """The probe, its process replaced by ``command``."""
    real = subprocess.run
    monkeypatch.setattr(
        dali_probe.subprocess, "run", lambda _, **given: real(command, **given | options)
    )
    dali_probe.region_decode_works.cache_clear()
    return dali_probe.region_decode_works(0, 0.65)


@pytest.mark.parametrize(
    ("command", "options", "reason"),
    [
        (CRASH, {}, "killed by SIGSEGV"),
        (FAIL, {}, "no such device"),
        ([sys.executable, "-c", "import time; time.sleep(9)"], {"timeout": 0.2}, "no answer"),
        ([sys.executable, "-c", ""], {}, "status 0"),
    ],
)
def test_a_failure_is_a_warning_of_one_line(monkeypatch, command, options, reason):
    with pytest.warns(UserWarning, match=rf"regions on GPU 0 \({reason}.*whole pictures") as seen:
        assert not by(monkeypatch, command, **options)
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


def test_it_works_and_is_asked_once(monkeypatch):
    assert by(monkeypatch, [sys.executable, "-c", "print('works')"])
    monkeypatch.setattr(dali_probe.subprocess, "run", None)
    assert dali_probe.region_decode_works(0, 0.65)


def test_the_program_itself_on_a_cpu():
    command = [sys.executable, "-m", "l2vit.data.dali_probe", "cpu", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["works"], done.stderr


def test_whole_pictures_cut_give_the_same_bytes():
    batch = dali_probe._batch()
    found = []
    for region in (True, False):
        pipeline = build_graph(
            lambda: batch, batch=32, input_size=32, interpolation="bicubic", threads=1,
            prefetch=1, gpu=False, device_id=None, region=region,
        )  # fmt: skip
        pipeline.build()
        (pictures,) = pipeline.run()
        found.append(np.array(pictures.as_tensor()))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("region", [True, False])
def test_both_graphs_are_valid_for_a_gpu(region):
    """Checked without a driver: every operator exists there and takes what it is given."""
    build_graph(
        dali_probe._batch, batch=32, input_size=32, interpolation="bicubic", threads=1,
        prefetch=1, gpu=True, device_id=None, region=region,
    ).serialize()  # fmt: skip
