"""The chaos campaign: its schedule, its comparison, and twenty of its events for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import chaos
from l2vit.launch import processes
from l2vit.train import checkpoint
from l2vit.train.checkpoint import CheckpointMeta, TensorSlice

ROOT = Path(__file__).parents[2]
KINDS = list(chaos.chaos_kinds.KINDS)


def test_a_seed_decides_the_schedule_and_every_kind_comes():
    planned = chaos.schedule(200, 7, KINDS, two_hosts=True)
    assert planned == chaos.schedule(200, 7, KINDS, two_hosts=True)
    assert planned != chaos.schedule(200, 8, KINDS, two_hosts=True)
    assert sum(len(events) for _, events in planned) == 200
    came = {
        hosts: {e.kind for h, events in planned if h == hosts for e in events} for hosts in (1, 2)
    }
    assert came[2] == set(KINDS)
    assert came[1] == set(KINDS) - {"link cut", "link cut shortly"}
    assert {hosts for hosts, _ in chaos.schedule(50, 7, KINDS, two_hosts=False)} == {1}


def saved(run: Path, weight: float, mean: float) -> Path:
    directory = checkpoint.step_directory(run, 8)
    tensors = {
        "param/w": torch.tensor([weight, 2.0]),
        "buffer/n.running_mean": torch.tensor([mean]),
    }
    pieces = [(TensorSlice(k, tuple(t.shape), 0, t.numel()), t) for k, t in tensors.items()]
    directory.mkdir(parents=True)
    part = checkpoint.write_part(directory / checkpoint.part_name(0, 1), pieces)
    meta = CheckpointMeta(8, 0, 64, {}, (), (), "", "")
    checkpoint.commit(directory, meta, [part])
    return run


def test_the_last_bit_of_a_weight_counts_and_of_a_statistic_does_not(tmp_path):
    above = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    one = saved(tmp_path / "one", 1.0, 1.0)
    assert chaos.differences(saved(tmp_path / "same", 1.0, above), one) == []
    assert chaos.differences(saved(tmp_path / "bit", above, 1.0), one) == ["param/w"]
    assert chaos.differences(saved(tmp_path / "far", 1.0, 1.01), one) == ["buffer/n.running_mean"]


@pytest.mark.cluster
def test_twenty_events_leave_the_weights_and_no_process(tmp_path):
    mark, found = f"L2VIT_TEST={tmp_path}", tmp_path / "found.json"
    command = [sys.executable, "benchmarks/chaos.py", "--events", "20", "--seed", "1"]
    done = subprocess.run(
        [*command, "--json", str(found)],
        cwd=ROOT,
        env=os.environ | {"L2VIT_TEST": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    table = json.loads(found.read_text())["events"]
    assert len(table) == 20
    assert "every run ended with the weights of the uninterrupted one" in done.stdout
    for happened in table:
        polite = happened["kind"] in ("SIGTERM", "supervisor killed", "rank paused", "disk full")
        assert not polite or happened["lost"] == 0, happened
    assert not processes.marked(mark.encode())
