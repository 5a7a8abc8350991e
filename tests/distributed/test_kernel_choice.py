"""Forms of operations chosen by a clock: here a pretended one, on one rank and on two."""

import json
from types import SimpleNamespace

import pytest
import torch
from forked_ranks import Ranks
from torch import nn

from l2vit.errors import ConfigError
from l2vit.models import ops
from l2vit.models.l2vit import WindowAttention
from l2vit.models.layers import DepthwiseConv, to_nchw, to_nhwc
from l2vit.models.ops import choice
from l2vit.train import kernels
from l2vit.train.config import EngineConfig
from l2vit.train.distributed import World

WIDE, NARROW = "depthwise_conv 2x32x14x14 7,1 float32", "depthwise_conv 2x32x14x14 5,1 float32"
WINDOWS = "window_attention 2x14x14x96 1,7 float32"
SECONDS = {(WIDE, "reference"): 3.0, (WIDE, "columns"): 1.0}
SECONDS |= {(NARROW, "reference"): 1.0, (NARROW, "columns"): 2.0}
CHOSEN = {WIDE: "columns", WINDOWS: "reference", NARROW: "reference"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = DepthwiseConv(32, 7), DepthwiseConv(32, 5)
        self.attn = WindowAttention(32, 1, 7)

    def forward(self, x):
        return to_nhwc(self.narrow(to_nchw(self.attn(to_nhwc(self.wide(x))))))


def trial_loss(network, images, device):
    return network(torch.zeros(images, 32, 14, 14, device=device)).sum()


def pretended(call, name, device):
    return SECONDS[call.key, name]


def no_clock(call, name, device):
    raise AssertionError("timed again")


def settle(directory, world, clock=pretended, wish="timed"):
    engine = EngineConfig(kernels=str(wish), precision="fp32")
    given = {"images": 2, "directory": directory, "world": world, "clock": clock}
    kernels.settle(engine, Net(), trial_loss, **given, time_pass=float)
    return choice._table


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A world of one rank, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield World(0, 1, 0, 1, torch.device("cpu"), "none")
    choice.use_table(None)


def run(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_the_fastest_form_is_taken_told_and_kept(tmp_path, alone, capsys):
    first = run(tmp_path, "first")
    assert settle(first, alone) == CHOSEN
    assert "depthwise_conv columns 1, reference 1" in capsys.readouterr().out
    assert json.loads((first / "kernels.json").read_text())["forms"] == CHOSEN
    # The next run on this device is told by the cache; and a continued one by its own file.
    assert settle(run(tmp_path, "second"), alone, no_clock) == CHOSEN
    changed = CHOSEN | {WIDE: "reference"}
    (first / "kernels.json").write_text(json.dumps({"format": 1, "forms": changed}))
    assert settle(first, alone, no_clock) == changed


def test_a_run_whose_kernels_have_changed_goes_on_and_is_told(tmp_path, alone, capsys):
    directory = run(tmp_path, "run")
    settle(directory, alone)
    settle(directory, alone, no_clock)
    assert "has changed" not in capsys.readouterr().err
    held = json.loads((directory / "kernels.json").read_text())
    (directory / "kernels.json").write_text(json.dumps(held | {"code": "older"}))
    assert settle(directory, alone, no_clock) == CHOSEN
    assert "code of the kernels has changed" in capsys.readouterr().err
    settle(directory, alone, no_clock)  # said once
    assert "has changed" not in capsys.readouterr().err


def test_a_damaged_cache_is_measured_anew(tmp_path, alone):
    kernels.cache_file().parent.mkdir(parents=True)
    for content in ("{", "[]", '{"format": 1}'):
        kernels.cache_file().write_text(content)
        assert settle(run(tmp_path, f"run{len(content)}"), alone) == CHOSEN


def test_a_file_pins_the_choice(tmp_path, alone):
    pinned = tmp_path / "pinned.json"
    pinned.write_text(json.dumps({"format": 1, "forms": {NARROW: "columns"}}))
    directory = run(tmp_path, "run")
    assert settle(directory, alone, no_clock, pinned) == {NARROW: "columns"}
    assert json.loads((directory / "kernels.json").read_text())["forms"] == {NARROW: "columns"}
    pinned.write_text(json.dumps({"format": 1, "forms": {NARROW: "fast"}}))
    with pytest.raises(ConfigError, match=r"engine.kernels: .*there is no form 'fast'"):
        settle(directory, alone, no_clock, pinned)
    pinned.write_text("{}")
    with pytest.raises(ConfigError, match=r"engine.kernels: .*holds no choice"):
        settle(directory, alone, no_clock, pinned)


@pytest.mark.parametrize("wish", ["rules", "auto"])
def test_a_cpu_is_not_timed_unasked(wish, tmp_path, alone):
    assert settle(tmp_path, alone, no_clock, wish) is None
    assert not (tmp_path / "kernels.json").exists()


def wrong(x, weight, bias):
    return 1.1 * ops.reference.depthwise_conv(x, weight, bias)


def test_a_form_with_other_results_is_out(tmp_path, alone, monkeypatch, capsys):
    monkeypatch.setitem(ops.FORMS["depthwise_conv"], "columns", wrong)
    assert settle(tmp_path, alone, lambda *_: 1.0)[WIDE] == "reference"
    assert "columns is not used (rank 0: result 0 in torch.float32" in capsys.readouterr().err


def test_one_that_fails_at_its_full_size_is_out(tmp_path, alone):
    def clock(call, name, device):
        if name == "columns":
            raise RuntimeError("invalid configuration argument")
        return 1.0

    assert set(settle(tmp_path, alone, clock).values()) == {"reference"}


def test_the_real_clock_times_every_form(alone):
    call = choice.Call("depthwise_conv", (2, 8, 9, 9), "float32", (7, 1))
    for name in kernels.candidates(call, torch.device("cpu"), whole_compiled=False):
        assert kernels.milliseconds(call, name, torch.device("cpu")) > 0
    whole = choice.Call("local_concentration", (2, 5, 5, 8), "float32", (3,))
    assert kernels.milliseconds(whole, "reference", torch.device("cpu")) > 0
    linear = choice.Call("linear_attention", (2, 40, 96), "float32", (1, 1))
    gpu = SimpleNamespace(type="cuda")
    wanted = ["reference", "triton", "compiled"]
    assert kernels.candidates(linear, gpu, whole_compiled=False) == wanted
    assert kernels.candidates(linear, gpu, whole_compiled=True) == wanted[:2]


def passes(directory, world, clock, compile="auto"):
    engine = EngineConfig(kernels="timed", precision="fp32", compile=compile)
    given = {"images": 2, "directory": directory, "world": world, "clock": pretended}
    return kernels.settle(engine, Net(), trial_loss, **given, time_pass=clock)


def fails(compiled):
    raise RuntimeError("Unsupported: a graph break" if compiled else "timed again")


def test_compiled_if_faster_and_so_for_good(tmp_path, alone, capsys):
    assert passes(run(tmp_path, "a"), alone, lambda compiled: 1.0 if compiled else 2.0) is True
    assert passes(tmp_path / "a", alone, fails) is True
    assert passes(run(tmp_path, "b"), alone, lambda compiled: 2.0 if compiled else 1.0) is False
    assert passes(tmp_path / "b", alone, fails, compile=True) is True
    capsys.readouterr()
    assert passes(run(tmp_path, "c"), alone, fails) is False
    assert "not compiled: Unsupported: a graph break" in capsys.readouterr().err


def test_the_real_clock_times_a_pass(alone):
    given = (Net(), trial_loss, 2, torch.float32, torch.device("cpu"))
    assert kernels.pass_milliseconds(*given, compiled=False) > 0


def on_two_ranks(world, directory):
    """Rank 1 alone finds fault with a form, and has no clock."""
    if world.rank == 1:
        ops.FORMS["depthwise_conv"]["columns"] = wrong
    clock = pretended if world.main else no_clock
    first = settle(directory / "broken", world, clock)
    ops.FORMS["depthwise_conv"]["columns"] = ops.cpu.depthwise_conv
    second = settle(directory / "whole", world, clock)
    continued = settle(directory / "whole", world, no_clock)
    return first, second, continued


def test_all_ranks_take_what_none_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("broken", "whole"):
        run(tmp_path, name)
    found = Ranks(on_two_ranks, 2, tmp_path, directory=tmp_path).results()
    assert found[0] == found[1]
    assert found[0][0] == dict.fromkeys(CHOSEN, "reference")
    assert found[0][1] == found[0][2] == CHOSEN
