"""Which form of each operation a run takes: timed on the device, settled by rank 0, kept.

Every form of an operation is first checked against the reference, on every rank: one that fails on
any rank is out. Rank 0 then times what is left, at the shapes this run has, and all ranks take its
choice. It is kept in ``kernels.json`` of the run directory, so that a continued run computes as it
began; times are kept for other runs on the same device in ``~/.cache/l2vit/kernels.json``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from l2vit import cli, files
from l2vit.errors import ConfigError, UserError
from l2vit.models import ops
from l2vit.models.ops import choice, gpu
from l2vit.models.ops.choice import REFERENCE, Call
from l2vit.train import precision
from l2vit.train.config import EngineConfig
from l2vit.train.distributed import World
from l2vit.train.model import TrialLoss

NAME = "kernels.json"
_WHAT = "choice of kernels"
_OTHER_CODE = (
    "the code of the kernels has changed since this run last ran: it goes on with the same forms, "
    "whose results may differ in the last bits"
)
_DEVICES = {"columns": ("cpu",), "triton": ("cuda",), "compiled": ("cuda",)}
"""Kinds of device that a form is for; the reference is for all."""
_COMPILED = ("linear_attention", "window_attention")
"""Operations whose reference is more than one operator, so that a compiler may gain."""
_EAGER = ("layer_norm", "local_concentration")
"""Operations that take none of our kernels where the network is compiled as a whole."""
_KERNELS = {"depthwise_conv": "depthwise"}
_CLAMP, _EPS = 100.0, 1e-5
_CHECKED_IMAGES = 2
_GROUPS, _GROUP_SECONDS = 5, 0.02

Times = dict[str, float]
"""Milliseconds of forward and backward pass by form."""
Clock = Callable[[Call, str, torch.device], float]
PassClock = Callable[[bool], float]
"""Milliseconds of a pass of the network: compiled (True) or as it is (False)."""
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """What a ``kernels.json`` says."""

    forms: dict[str, str] = field(default_factory=dict)
    compiled: bool | None = None
    """None: it says nothing."""
    code: str | None = None
    """Hash of the forms' code that the run last ran with."""


def settle(
    engine: EngineConfig,
    network: nn.Module,
    trial_loss: TrialLoss,
    *,
    images: int,
    directory: Path,
    world: World,
    clock: Clock | None = None,
    time_pass: PassClock | None = None,
) -> bool:
    """Choose the forms of this run's operations, on all ranks alike, and use them from now on.

    Args:
        engine: ``engine.kernels`` says how to choose.
        network: stays as it is; a copy shows which operations it has.
        trial_loss: computes the loss of so many images (``Task.trial_loss``).
        images: of a micro-batch.
        directory: the run's.
        world: this rank's place.
        clock: times a form; tests give their own.
        time_pass: times a pass of the whole network, as it is or compiled.

    Returns:
        Whether to compile the network.

    Raises:
        ConfigError: ``engine.kernels`` names a file that holds no choice.
    """
    wish = engine.kernels
    if wish == "rules" or (wish == "auto" and world.device.type != "cuda"):
        choice.use_table(None)
        return engine.compile is True
    pinned = Path(wish) if wish not in ("auto", "timed") else None
    kept = _of_main(world, lambda: _read(pinned or directory / NAME, must_exist=bool(pinned)))
    if pinned is None and kept.code not in (None, _code()):
        _tell(world, f"{directory / NAME}: {_OTHER_CODE}")
    dtype = precision.DTYPES[engine.precision]
    forms = dict(kept.forms)
    if pinned is None:
        calls = calls_of(network, trial_loss, images, dtype, world)
        missing = [call for key, call in calls.items() if key not in forms]
        forms |= _chosen(missing, engine, world, clock or milliseconds)
    choice.use_table(forms)
    compiled = kept.compiled if engine.compile == "auto" else engine.compile
    if compiled is None:
        timed = time_pass or functools.partial(
            pass_milliseconds, network, trial_loss, images, dtype, world.device
        )
        compiled = engine.zero_stage < 3 and _compiled_is_faster(timed, world)
    if world.main:
        held = {"format": 1, "forms": forms, "compiled": compiled, "code": _code()}
        files.write_json(directory / NAME, held)
        whole = "compiled" if compiled else "not compiled"
        cli.tell(f"{summary(forms)}; network {whole}; kept in {directory / NAME}")
    return compiled


def summary(forms: Mapping[str, str]) -> str:
    """A line for people: how many shapes of each operation take which form."""
    counted: dict[str, Counter[str]] = {}
    for key, form in forms.items():
        counted.setdefault(key.partition(" ")[0], Counter())[form] += 1
    parts = [
        f"{op} {', '.join(f'{form} {count}' for form, count in counts.most_common())}"
        for op, counts in sorted(counted.items())
    ]
    return f"kernels (shapes each): {'; '.join(parts) or 'none'}"


def calls_of(
    network: nn.Module,
    trial_loss: TrialLoss,
    images: int,
    dtype: torch.dtype,
    world: World,
) -> dict[str, Call]:
    """The operations in one pass of so many images through a copy of ``network``, by key."""
    twin = copy.deepcopy(network).to(world.device).train()
    precision.cast(twin, dtype)
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), choice.recorded_calls() as calls:
        trial_loss(twin, images, world.device)
    return calls


def candidates(call: Call, device: torch.device, *, whole_compiled: bool) -> list[str]:
    """The forms worth trying, the reference first.

    Args:
        call: the operation and its inputs.
        device: where it will run.
        whole_compiled: the network is compiled as a whole: then the reference is compiled anyway.
    """
    names = [*ops.FORMS[call.op], *(["compiled"] if call.op in _COMPILED else [])]
    if whole_compiled:
        names = [n for n in names if n != "compiled" and (n == REFERENCE or call.op not in _EAGER)]
    return [n for n in names if n == REFERENCE or device.type in _DEVICES.get(n, ("cuda",))]


def refusals(call: Call, names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Why forms other than the reference cannot be used here; those that can are left out."""
    found = {}
    for name in names:
        if name == REFERENCE:
            continue
        try:
            _require_agreement(call, name, device)
        except Exception as error:  # whatever goes wrong, the reference is there
            found[name] = _first_line(error)
    return found


def milliseconds(call: Call, name: str, device: torch.device) -> float:
    """Median time of a forward and a backward pass, by CUDA events on a GPU."""
    return _median(_pass(call, name, _inputs(call, device, call.shape[0])), device)


def pass_milliseconds(
    network: nn.Module,
    trial_loss: TrialLoss,
    images: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
) -> float:
    """Median time of a forward and a backward pass through a copy of ``network``."""
    twin = copy.deepcopy(network).to(device).train()
    precision.cast(twin, dtype)
    if compiled:  # a network of several graphs would gain little and compile again and again
        twin.compile(fullgraph=True, dynamic=False)
    return _median(lambda: trial_loss(twin, images, device).backward(), device)


# -- choosing


def _chosen(calls: list[Call], engine: EngineConfig, world: World, clock: Clock) -> dict[str, str]:
    device, whole = world.device, engine.compile is True
    wanted = [candidates(call, device, whole_compiled=whole) for call in calls]
    own = [refusals(call, names, device) for call, names in zip(calls, wanted, strict=True)]
    everywhere = world.gather(own)
    for place, (call, names) in enumerate(zip(calls, wanted, strict=True)):
        for rank, found in enumerate(everywhere):
            for name, reason in found[place].items():
                if name in names:
                    names.remove(name)
                    _tell(world, f"{call.key}: {name} is not used (rank {rank}: {reason})")
    return _of_main(world, lambda: _fastest(calls, wanted, device, clock))


def _fastest(
    calls: list[Call], wanted: list[list[str]], device: torch.device, clock: Clock
) -> dict[str, str]:
    times = _cached_times(device)
    for call, names in zip(calls, wanted, strict=True):
        held = times.setdefault(call.key, {})
        for name in names if len(names) > 1 else []:
            if name not in held:
                held.update(_time(call, name, device, clock))
    _keep_times(device, times)
    return {
        call.key: min(names, key=lambda n: times[call.key].get(n, float("inf")))
        for call, names in zip(calls, wanted, strict=True)
    }


def _time(call: Call, name: str, device: torch.device, clock: Clock) -> Times:
    try:
        return {name: clock(call, name, device)}
    except Exception as error:  # too large for a grid or for the memory
        cli.tell(f"warning: {call.key}: {name} is not used ({_first_line(error)})", error=True)
        return {}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _compiled_is_faster(time_pass: PassClock, world: World) -> bool:
    """Every rank compiles, so that none is alone in failing; rank 0's times decide."""
    failure, compiled = "", 0.0
    try:
        compiled = time_pass(True)
    except Exception as error:  # the network as it is is there
        failure = _first_line(error)
    failures = [text for text in world.gather(failure) if text]
    if failures:
        _tell(world, f"the network is not compiled: {failures[0]}")
        return False
    return _of_main(world, lambda: compiled < time_pass(False))


def _tell(world: World, text: str) -> None:
    if world.main:
        cli.tell(f"warning: {text}", error=True)


def _of_main(world: World, action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0, on every rank; its error likewise."""
    problem: UserError | None = None
    found: Any = None
    if world.main:
        try:
            found = action()
        except UserError as error:
            problem = error
    world.raise_on_all_ranks(problem)
    return world.broadcast(found)


# -- files


def _read(path: Path, *, must_exist: bool) -> Kept:
    if not path.is_file() and not must_exist:
        return Kept()
    held = files.read_json(path, what=_WHAT)
    forms = held.get("forms") if isinstance(held, dict) and held.get("format") == 1 else None
    if not isinstance(forms, dict):
        raise ConfigError(f"engine.kernels: {path} holds no choice of kernels of format 1")
    for key, form in forms.items():
        op = str(key).partition(" ")[0]
        if op not in ops.FORMS or form not in (*ops.FORMS[op], "compiled"):
            raise ConfigError(f"engine.kernels: {path}: {key}: there is no form {form!r}")
    compiled = held.get("compiled")
    code = held.get("code")
    return Kept(
        forms,
        compiled if isinstance(compiled, bool) else None,
        code if isinstance(code, str) else None,
    )


def cache_file() -> Path:
    """Where the times measured on this machine are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "l2vit" / NAME


def _cached_times(device: torch.device) -> dict[str, Times]:
    try:
        held = files.read_json(cache_file(), what="cache of kernel times")
        return {key: dict(times) for key, times in held[_identity(device)].items()}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _keep_times(device: torch.device, times: dict[str, Times]) -> None:
    """Best effort: without a home directory the next run measures again."""
    try:
        held = files.read_json(cache_file(), what="cache of kernel times")
    except UserError:
        held = {}
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        known = held if isinstance(held, dict) else {}
        files.write_json(cache_file(), {**known, _identity(device): times})
    except OSError as error:
        cli.tell(f"warning: {cache_file()}: {error.strerror}; times are not kept", error=True)


@functools.cache
def _identity(device: torch.device) -> str:
    """What times depend on besides the call: the device, PyTorch and the code of the forms."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, forms {_code()}"


@functools.cache
def _code() -> str:
    """Changes with the code of the forms, and so whenever their sums may round otherwise."""
    code = hashlib.sha256()
    for path in sorted(Path(ops.__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()[:12]


# -- running a form by itself


def _inputs(call: Call, device: torch.device, images: int) -> list[Any]:
    """Arguments of an operation; the first is of ``call.shape``, but of so many images."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, call.dtype)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, device=device, generator=generator)
        return made.to(dtype).requires_grad_()

    if call.op == "depthwise_conv":
        channels, (kernel, biased) = call.shape[1], call.options
        x = draw(images, *call.shape[2:], channels).permute(0, 3, 1, 2)  # channels-last
        return [x, draw(channels, 1, kernel, kernel), draw(channels) if biased else None]
    x = draw(images, *call.shape[1:])
    if call.op == "layer_norm":
        return [x, draw(x.shape[-1]), draw(x.shape[-1]), _EPS]
    if call.op == "window_attention":
        return [x, *call.options]
    if call.op == "local_concentration":
        (size,), channels = call.options, x.shape[-1]
        convs = [(draw(channels, 1, size, size), draw(channels)) for _ in range(2)]
        norm = draw(channels), draw(channels)
        return [x, convs[0], norm, convs[1], (None, None), 0.1, _EPS]
    heads, scaled = call.options
    return [x, draw(heads, 1, 1) if scaled else None, heads, _CLAMP]


def _pass(call: Call, name: str, arguments: list[Any]) -> Callable[[], list[Tensor]]:
    """A function that gives the outputs of a form and the gradients of its arguments."""
    compute = ops.compiled_form(call.op) if name == "compiled" else ops.FORMS[call.op][name]
    leaves = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]

    def step() -> list[Tensor]:
        found = compute(*arguments)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        ones = [torch.ones_like(out) for out in outputs]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, ones)]

    return step


def _require_agreement(call: Call, name: str, device: torch.device) -> None:
    """Compare a form on a few images with the reference in fp32.

    Raises:
        ArithmeticError: they differ by more than roundings.
        RuntimeError: the kernel cannot run here.
    """
    arguments = _inputs(call, device, min(_CHECKED_IMAGES, call.shape[0]))
    if name == "triton" and not gpu.may_run(_KERNELS.get(call.op, call.op), arguments[0]):
        raise RuntimeError("the kernel does not run on this device")
    wide = tree_map_only(Tensor, lambda a: a.detach().float().requires_grad_(), arguments)
    expected = _pass(call, REFERENCE, wide)()
    gpu.require_close(_pass(call, name, arguments)(), expected, getattr(torch, call.dtype))


def _median(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call, once it is warm."""
    for _ in range(3):
        step()
    once = _seconds(step, 1, device)
    repeats = max(1, min(100, round(_GROUP_SECONDS / max(once, 1e-6))))
    return 1e3 * statistics.median(_seconds(step, repeats, device) for _ in range(_GROUPS))


def _seconds(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Of one of ``repeats`` calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - began) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats
