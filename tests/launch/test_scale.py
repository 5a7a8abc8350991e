"""The simulation of many ranks, small: it runs, and it would notice a lost or doubled sample."""

import json

import numpy as np
import pytest

from benchmarks import scale
from l2vit.data.order import SampleOrder

SMALL = ["--ranks", "32", "--samples", "100000", "--classes", "50", "--batch", "256"]
SMALL += ["--parameters", "4300000"]


def test_simulation(tmp_path, capsys):
    assert scale.main([*SMALL, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["batches_an_epoch"] == 100_000 // 256
    assert found["samples_left_out"] == 100_000 % 256
    assert found["shards"] == -(-100_000 // scale.SHARD_SAMPLES)
    assert found["files"] == 33 and found["differences_found"] == 1
    # Weights and two moments in fp32; tensors of 4096 rows, so a little less than asked for.
    assert found["checkpoint_gib"] == pytest.approx(12 * 4.3e6 / 2**30, rel=0.05)
    assert "order_mib" in capsys.readouterr().out


def test_a_doubled_sample_is_noticed(tmp_path, monkeypatch, capsys):
    honest = SampleOrder.ids_at

    def doubling(self, epoch, positions):
        ids = np.array(honest(self, epoch, positions))
        if len(ids) > 1:
            ids.flat[1] = ids.flat[0]
        return ids

    monkeypatch.setattr(SampleOrder, "ids_at", doubling)
    assert scale.main(SMALL) == 1
    capsys.readouterr()
