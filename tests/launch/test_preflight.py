"""What preflight finds: differences between ranks, a directory that is not shared, slow parts."""

import dataclasses
import sys
from pathlib import Path

import pytest

from l2vit.errors import UserError
from l2vit.launch import cluster_check
from l2vit.launch.cluster_check import Measured, Need, Speed
from l2vit.train import preflight
from l2vit.train.preflight import Facts

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import small_runs
from forked_ranks import Ranks

SAME = {"torch": "2.11.0", "configuration": "abc", "manifest": "def"}


def facts(rank: int, **changes) -> Facts:
    values = {"rank": rank, "host": f"node{rank // 2}", "device": "NVIDIA H100 80GB HBM3"}
    values |= {"driver": "580.1", "free_gib": 78.0, "clock": 1e9, "same": dict(SAME)}
    return Facts(**(values | changes))


def texts(*ranks: Facts) -> list[str]:
    return [str(problem) for problem in preflight.differences(ranks)]


def test_ranks_that_agree_have_no_problem():
    assert texts(*map(facts, range(8))) == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"same": SAME | {"torch": "2.10.0"}}, ["torch", "has 2.10.0", "others have 2.11.0"]),
        ({"same": SAME | {"configuration": "xyz"}}, ["configuration", "same file and overrides"]),
        ({"same": SAME | {"manifest": "not readable"}}, ["manifest", "data.train"]),
        ({"same": {"torch": "2.11.0", "manifest": "def"}}, ["configuration", "has missing"]),
        ({"driver": "570.2"}, ["driver", "has 570.2", "install the same driver"]),
        ({"device": "NVIDIA A100-SXM4-80GB"}, ["device", "A100"]),
        ({"clock": 1e9 - 30}, ["clock of node1", "-30.0 s off", "chrony"]),
        ({"free_gib": 40.0}, ["40.0 GiB free, others 78.0", "nvidia-smi"]),
    ],
)
def test_a_difference_names_rank_host_and_fix(change, parts):
    found = texts(facts(0), facts(1), facts(2), facts(3, **change))
    assert len(found) == 1
    for part in ["node1", *parts]:
        assert part in found[0]
    assert "rank 3" in found[0]


def test_many_different_ranks_are_counted_not_listed():
    ranks = [facts(r, driver="570" if r < 10 else "580") for r in range(32)]
    (found,) = texts(*ranks)
    assert found.count("rank ") == 4 and "6 more ranks differ" in found


def test_slow_parts_are_compared_with_the_need():
    need = Need(gradient_bytes=400_000_000, compute_seconds=0.1, images_per_second_per_node=1000.0)
    good = Measured(20.0, 300.0, 256.0, {"node0": 2000.0, "node1": 1500.0})
    assert cluster_check.judge(good, need, ranks=16) == []
    # 2 · 15/16 · 400 MB at 1 GB/s: 750 ms beside 100 ms of computing.
    slow_wire = dataclasses.replace(good, bus_gbs=1.0)
    (problem,) = cluster_check.judge(slow_wire, need, ranks=16)
    assert "takes 750 ms" in str(problem) and "NCCL_IB_HCA" in problem.fix
    slow_loader = dataclasses.replace(good, images_per_second={"node0": 2000.0, "node1": 800.0})
    (problem,) = cluster_check.judge(slow_loader, need, ranks=16)
    assert "node1 loads 800 images/s" in str(problem) and "data.threads" in problem.fix
    assert cluster_check.judge(slow_loader, Need(1, 0.0, 0.0), ranks=16) == []
    text = cluster_check.table([facts(0), facts(1)], slow_loader, need, [problem])
    assert "1 problem(s)" in text and "fix: raise data.threads" in text and "node1" in text


def test_a_slow_card_is_named():
    """Sixteen cards; one is throttled, one has slow memory, the spread of the others is usual."""
    speeds = [Speed(r, f"node{r // 8}", 700.0 + 10 * (r % 4), 3000.0 - r) for r in range(16)]
    assert cluster_check.slow_devices(speeds, cluster_check.SLOW_SHARE["cuda"]) == []
    speeds[3] = dataclasses.replace(speeds[3], tflops=520.0)
    speeds[12] = dataclasses.replace(speeds[12], memory_gbs=1900.0)
    products, memory = cluster_check.slow_devices(speeds, cluster_check.SLOW_SHARE["cuda"])
    assert "rank 3 on node0 does 520 TFLOP/s, the median is 710" in str(products)
    assert "rank 12 on node1 does 1.9e+03 GB/s of memory" in str(memory)
    assert "power limit" in products.fix
    first, second = cluster_check.speed_lines(speeds)
    assert "520 to 730" in first and "1.9e+03 to 3e+03" in second


def test_devices_are_known_by_their_names():
    assert cluster_check.known_device("NVIDIA H100 80GB HBM3").name == "h100"
    assert cluster_check.known_device("CPU, 2 cores") is None


def on_two_ranks(world, shards: Path, folder: Path):
    from l2vit import config
    from l2vit.train.config import TrainConfig

    def load(run: Path, *overrides: str) -> TrainConfig:
        changes = [f"run.dir={run}", "model.name=l2vit_mini", "data.input_size=32", *overrides]
        return config.load(TrainConfig, small_runs.settings(shards, run), changes)

    (folder / str(world.rank)).mkdir()
    world.barrier()
    shared = load(folder / "shared") if world.main else None
    shared = world.broadcast(shared)
    found = {"facts": preflight.collect(shared, world)}
    found["shared"] = preflight.shared_directory(folder / "shared", world)
    apart = folder / str(world.rank) / "run"  # the same path on two hosts that share nothing
    found["apart"] = preflight.shared_directory(apart, world, seconds=0.3)
    preflight.quick(shared, world)
    try:
        preflight.quick(dataclasses.replace(shared, run=_seeded(shared, world.rank)), world)
    except UserError as error:
        found["quick"] = str(error)
    cluster_check.SECONDS = 0.5
    found["measured"] = cluster_check.measure(shared, world)
    found["need"] = cluster_check.needed(shared, world, found["facts"])
    return found


def _seeded(config, seed: int):
    return dataclasses.replace(config.run, seed=seed)


def test_two_real_ranks(tmp_path, monkeypatch):
    # One host, one clock: ranks read it apart only as far as a busy machine lets one of them wait.
    monkeypatch.setattr(preflight, "CLOCK_SECONDS", 300.0)
    shards = small_runs.build_shards(tmp_path, 80)
    (tmp_path / "ranks").mkdir()
    first, second = Ranks(on_two_ranks, 2, shards, tmp_path / "ranks", directory=tmp_path).results()
    assert [f.rank for f in first["facts"]] == [0, 1] and first["facts"] == second["facts"]
    assert preflight.differences(first["facts"]) == []
    assert all(f.clock > 1.7e9 for f in first["facts"]), "seconds since 1970"
    assert len(first["facts"][0].same["manifest"]) == 12
    assert first["shared"] == second["shared"] == []
    (problem,) = first["apart"]
    assert problem.fatal and "did not appear" in str(problem) and "file system" in problem.fix
    assert first["quick"] == second["quick"]
    assert "configuration differs: rank 1 on " in first["quick"]
    measured = first["measured"]
    assert 0 < measured.bus_gbs < 1000 and measured.latency_us > 0
    assert all(rate > 0 for rate in measured.images_per_second.values())
    assert [speed.rank for speed in measured.speeds] == [0, 1]
    # Any CPU of the last decades and none of the next.
    assert all(1e-3 < s.tflops < 100 and 0.1 < s.memory_gbs < 5000 for s in measured.speeds)
    assert first["measured"].speeds == second["measured"].speeds
    # l2vit_mini has 2.3 M weights with four classes; gradients travel in fp32.
    assert 2.2e6 < first["need"].gradient_bytes / 4 < 2.5e6
    assert not list((tmp_path / "ranks").rglob(".preflight"))
