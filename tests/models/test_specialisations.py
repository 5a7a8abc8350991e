"""Every kernel as tiny, small and base launch it, compiled for A100, H100 and B200."""

from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
from launches import KINDS, kernels, launches
from machine_code import machine_code
from test_kernels import CASES

import l2vit  # noqa: F401

MODELS = {
    "tiny": ("l2vit_tiny", 224, {}),
    "small": ("l2vit_small", 224, {}),
    "base": ("l2vit_base", 224, {}),
    "base at 384": ("l2vit_base", 384, {"window_size": 12}),
    "tiny with 5×5": ("l2vit_tiny", 224, {"lcm_kernel": 5}),
}
SPILLED = {("window_attention_kernel", 100): 8}
"""Bytes that are allowed: windows of 12 on a B200. More registers would cure it there and cost an
H100 a fifth of its warps."""


def distinct(dtype, *names):
    """The launches of these models (all by default) that Triton compiles by themselves."""
    found = set()
    for name in names or MODELS:
        model, size, options = MODELS[name]
        # fp16 and bf16 are launched alike.
        traced = torch.bfloat16 if dtype == torch.float16 else dtype
        found |= launches(model, size=size, dtype=traced, **options)
    return sorted((launch.of_kind(KINDS[dtype]) for launch in found), key=repr)


def require_no_spills(found, architecture, directory):
    """Returns the registers of each kernel, most last."""
    registers = defaultdict(list)
    for launch in found:
        built = launch.compile(architecture)
        code = machine_code(built, directory)
        allowed = SPILLED.get((launch.kernel, architecture), 0)
        assert code.spilled <= allowed, (launch, code)
        assert built.metadata.shared <= 99 * 1024, launch
        registers[launch.kernel].append(code.registers)
    return {kernel: sorted(values) for kernel, values in sorted(registers.items())}


def test_a_step_of_base_launches_each_kernel_that_is_compiled_alone():
    """But the steps' own of windows of 12; so no kernel is left out there or here."""
    launched = {launch.kernel for launch in distinct(torch.bfloat16, "base", "base at 384")}
    assert launched == {name for _, name, _ in CASES} & launched
    assert launched >= {"forward_kernel", "gradients_kernel", "window_attention_kernel"}
    assert launched <= set(kernels())


@pytest.mark.ci
def test_every_launch_of_base_compiles_for_an_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    print(require_no_spills(distinct(torch.bfloat16, "base"), 90, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", list(KINDS), ids=list(KINDS.values()))
def test_every_launch_compiles(dtype, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    print(require_no_spills(distinct(dtype), architecture, tmp_path))
