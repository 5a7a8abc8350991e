"""Triton kernels for pictures: their values (interpreted), their machine code, their cost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from l2vit import config
from l2vit.data import augment_device, augment_gpu, mixup
from l2vit.data.augment import OPS
from l2vit.plan.step_parts import augmentation_parts
from l2vit.train.config import TrainConfig

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_bytes_in_the_interpreter():
    """Those of timm's functions on PIL pictures, every operation (interpreted_augment.py), and
    mixing from bytes (interpreted_mixing.py)."""
    files = [Path(__file__).with_name(f"interpreted_{what}.py") for what in ("augment", "mixing")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


BYTES = {"pixels": "*u8", "tables": "*u8", "result": "*u8", "plan": "*fp64"}
MIXED = {"pixels": "*u8", "table": "*i64", "labels": "*i64", "quantiles": "*fp32"}
MIXED |= {f"{what}_{name}": "fp32" for what in ("mean", "std") for name in ("red", "green", "blue")}
MIXED |= {"on": "fp32", "off": "fp32"}


def compiled(kernel, types, constants, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {key: kind for key, kind in types.items() if key in signature}
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False},
    )


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "constants", "types"),
    [
        ("table_kernel", {"BLOCK": 1024}, BYTES),
        ("gather_kernel", {"CUBIC": True, "BLOCK": 512}, BYTES),
        ("gather_kernel", {"CUBIC": False, "BLOCK": 512}, BYTES),
        ("mix_kernel", {"BLOCK": 1024}, {**MIXED, "result": "*bf16"}),
        ("target_kernel", {"BLOCK": 1024}, {**MIXED, "result": "*fp32"}),
    ],
)
def test_compiles_without_a_gpu(name, constants, types, architecture, tmp_path, monkeypatch):
    """No spills, and no product fused with a sum: that would change bytes."""
    from l2vit.data import augment_triton, mix_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(augment_triton if types is BYTES else mix_triton, name)
    built = compiled(kernel, types, constants, architecture)
    assert not re.findall(r"\bfma\.", built.asm["ptx"])
    if "*bf16" in types.values():
        assert "cvt.rn.bf16" in built.asm["ptx"]  # rounded as PyTorch does, to the nearest
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    used = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", used.stdout) == ["0", "0"]


def test_launches_and_bytes_of_256_pictures():
    """The budget: at most 10 launches and 0.5 GB for RandAugment and as much for the rest."""
    settings = config.load(TrainConfig, str(ROOT / "pretrain" / "configs" / "in22k_base.yaml"))
    parts = augmentation_parts(settings, batch=256, classes=21841)
    assert set(parts) == {"RandAugment", "normalise, erase, mix"}
    for found in parts.values():
        assert found.total() <= 10
        assert sum(op.bytes * count for op, count in found.items()) <= 0.5e9


def test_without_agreement_the_loader_normalises(monkeypatch):
    """Pretended on the meta device; on a CPU nothing is compared and nobody is told."""
    device = torch.device("meta")
    mixup.kernels_agree.cache_clear()
    monkeypatch.setattr(mixup, "_compare", lambda device: 1 / 0)
    with pytest.warns(UserWarning, match="that mix images are not used on meta: division by zero"):
        assert not mixup.kernels_agree(device)
    assert not mixup.kernels_agree(torch.device("cpu"))


def test_without_agreement_the_tensor_operations_run(monkeypatch):
    """Pretended on the meta device, where the two cannot be compared."""
    augment_device.kernels_agree.cache_clear()
    called = []
    monkeypatch.setattr(augment_gpu, "apply_ops", lambda pixels, *_, **__: called.append(pixels))
    pixels = torch.empty(1, 8, 8, 3, dtype=torch.uint8, device="meta")
    ops = np.full((1, 1), OPS.index("Invert"))
    with pytest.warns(UserWarning, match="kernels are not used on meta"):
        augment_device.apply_ops(
            pixels, ops, np.zeros((1, 1)), fill=(0, 0, 0), interpolation="bicubic"
        )
    assert called[-1] is pixels


@pytest.mark.gpu
def test_bytes_on_a_gpu():
    assert augment_device.kernels_agree(torch.device("cuda", 0))
    assert mixup.kernels_agree(torch.device("cuda", 0))
