"""The Triton kernels: their arithmetic (interpreted), whether they compile, and their choice."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from machine_code import machine_code
from torch.utils.flop_counter import FlopCounterMode

from l2vit.models import ops
from l2vit.models.ops import gpu
from l2vit.plan import kernel_costs

triton = pytest.importorskip("triton")


INTERPRETED = ["kernels", "layer_norm", "local_concentration", "window_attention"]


@pytest.mark.parametrize("name", [f"interpreted_{part}.py" for part in INTERPRETED])
def test_interpreted(name):
    """Against float64, without a GPU; see the file."""
    file = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


ATTENTION = {"D": 32, "BLOCK": 32}
WINDOW_BLOCK = {"BLOCK": 64, "PRECISION": "tf32"}
SLIDE = {"K": 7, "CHANNELS": 96, "BLOCK_C": 32, "NORMED": False}
NORM = {"HAS_RESIDUAL": True}
DIVISIBLE = [["tt.divisibility", 16]]  # as Triton finds pointers and multiples of 16
CASES = [
    ("linear_attention", "context_kernel", {}),
    ("linear_attention", "out_kernel", {"HAS_SCALE": True}),
    ("linear_attention", "query_gradient_kernel", {"HAS_SCALE": True, "BLOCK": 16}),
    ("linear_attention", "key_value_gradient_kernel", {}),
    ("window_attention", "window_attention_kernel", {"SIZE": 7}),
    ("window_attention", "window_gradient_kernel", {"SIZE": 7}),
    ("window_attention", "window_gradient_in_blocks_kernel", {"SIZE": 12}),
    ("depthwise", "taps_kernel", {"K": 7, "BLOCK_C": 64, "RESIDUAL": True}),
    ("depthwise", "forward_kernel", SLIDE | {"COLUMNS": 7, "HAS_BIAS": True}),
    ("depthwise", "gradients_kernel", SLIDE | {"K": 3, "COLUMNS": 7, "BLOCK_C": 64}),
    ("layer_norm", "layer_norm_gradient_kernel", NORM | {"BLOCK_M": 16, "BLOCK_C": 128}),
    ("local_concentration", "gelu_kernel", {"BLOCK_M": 32, "BLOCK_C": 64}),
    (
        "local_concentration",
        "statistics_kernel",
        {"UPDATE": True, "PARTS": 64, "BLOCK_C": 32},
    ),
    ("local_concentration", "gelu_norm_gradient_kernel", {"BLOCK_M": 32, "BLOCK_C": 64}),
    ("sums", "add_parts_kernel", {"TAPS": 49, "PARTS": 64, "BLOCK": 32}),
]
POINTERS = ("qkv", "x", "out", "grad", "grad_qkv", "weight", "bias")
POINTERS += ("residual", "grad_x", "summed")
SUMS = ("mean", "rstd", "taps", "lse", "context", "total", "scale", "part")
SUMS += ("grad_context", "grad_total", "grad_scale", "norm", "sums", "running_mean", "running_var")
FLOATS = ("clamp", "factor", "momentum", "eps")


def build(module, name, constants, kind, architecture, options=None):
    """A kernel compiled as on a GPU: "bf16" or "fp32" tensors, sizes that are not constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    loaded = pytest.importorskip(f"l2vit.models.ops.triton_{module}")
    if module == "linear_attention":
        precision = "ieee" if kind == "fp32" else "tf32"
        constants = ATTENTION | {"PRECISION": precision} | constants
    if module == "window_attention":
        block = {"BLOCK": 32, "PRECISION": "ieee"} if kind == "fp32" else WINDOW_BLOCK
        constants = {"D": 32} | block | constants
    kernel = getattr(loaded, name)
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(FLOATS, "fp32")
    signature |= dict.fromkeys(POINTERS, f"*{kind}") | dict.fromkeys(SUMS, "*fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {argument: signature[argument] for argument in kernel.arg_names}
    divisible = {
        (place,): DIVISIBLE for place, kind in enumerate(signature.values()) if kind[0] == "*"
    }
    if "channels" in signature and "channels" not in constants:
        divisible[(kernel.arg_names.index("channels"),)] = DIVISIBLE
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    options = options or {}
    if name == "query_gradient_kernel":
        options = loaded.query_options(torch.float32 if kind == "fp32" else torch.bfloat16)
    elif module == "window_attention" and kind == "fp32":
        options = {"num_stages": 1}
    elif module == "depthwise":
        options = {"num_stages": 1, "num_warps": 1}
        options |= {"maxnreg": loaded._REGISTERS} if name == "forward_kernel" else {}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("module", "name", "constants"), CASES, ids=[c[1] for c in CASES])
def test_compiles_without_a_gpu(module, name, constants, kind, architecture, tmp_path, monkeypatch):
    """To machine code for A100, H100 and B200: shared memory fits, no register is spilled.

    But for 8 bytes of stack that Triton 3.8, which comes with torch 2.14, gives one of them.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = build(module, name, constants, kind, architecture)
    assert built.metadata.shared <= 99 * 1024
    on_the_stack = (name, kind, architecture) == ("context_kernel", "fp32", 100)
    assert machine_code(built, tmp_path).spilled <= (8 if on_the_stack else 0)


@pytest.mark.parametrize(("size", "normed"), [(3, False), (5, False), (7, False), (7, True)])
def test_instructions_of_depthwise_convolutions(size, normed, tmp_path, monkeypatch):
    """Thread-instructions an output on an H100 in bf16: what the ledger's times stand on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = 64 if size == 3 else 32
    slide = {"K": size, "CHANNELS": 128, "BLOCK_C": block, "NORMED": normed}
    for direction, columns in (("forward", 7), ("gradients", 7 if size == 3 else 4)):
        constants = slide | {"COLUMNS": columns}
        constants |= {"HAS_BIAS": True} if direction == "forward" else {}
        built = build("depthwise", f"{direction}_kernel", constants, "bf16", 90)
        found = machine_code(built, tmp_path)
        each = found.loops[0] / (columns * block / 32)  # one pass over a row of each channel
        assert found.spilled == 0 and found.registers <= 255
        stated = kernel_costs.DEPTHWISE[direction][size]
        stated += kernel_costs.NORMED[direction] * normed
        assert each == pytest.approx(stated, rel=0.15)
        assert direction != "forward" or each <= 100


def test_instructions_of_gelu_beside_a_norm(tmp_path, monkeypatch):
    """An element, on an H100 in bf16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, direction in (("gelu_kernel", "forward"), ("gelu_norm_gradient_kernel", "gradient")):
        built = build("local_concentration", name, {"BLOCK_M": 32, "BLOCK_C": 64}, "bf16", 90)
        found = machine_code(built, tmp_path)
        assert found.spilled == 0 and found.registers <= 80
        each = (found.loops[0] if found.loops else found.instructions) / 16  # 32·64 of 128 threads
        assert each == pytest.approx(kernel_costs.GELU[direction], rel=0.15)


@pytest.mark.parametrize(("block", "rows"), [(128, 16), (256, 8), (512, 4), (1024, 2)])
def test_instructions_of_the_layer_norms_gradient(block, rows, tmp_path, monkeypatch):
    """An element, on an H100 in bf16; the channels of base."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = NORM | {"BLOCK_M": rows, "BLOCK_C": block}
    built = build("layer_norm", "layer_norm_gradient_kernel", constants, "bf16", 90)
    found = machine_code(built, tmp_path)
    assert found.spilled == 0 and found.registers <= 128  # four blocks a multiprocessor
    each = found.loops[-1] / (rows * block / 128)
    assert each == pytest.approx(kernel_costs.LAYER_NORM, rel=0.15)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_occupancy_of_the_query_gradient(kind, tmp_path, monkeypatch):
    """16 of an H100's 64 warps a multiprocessor: 65,536 registers, 227 KB of shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HAS_SCALE": True, "BLOCK": 16}
    built = build("linear_attention", "query_gradient_kernel", constants, kind, 90)
    warps, shared = built.metadata.num_warps, built.metadata.shared + 1024
    registers = machine_code(built, tmp_path).registers
    assert 32 * -(-registers // 8) * 8 * 16 <= 65536
    assert 16 // warps * shared <= 227 * 1024


ONES = ("tokens", "heads", "blocks", "splits", "rows", "height", "width", "channels", "across")
ONES += ("down", "items", "parts")


@pytest.mark.parametrize(("module", "name", "constants"), CASES, ids=[c[1] for c in CASES])
def test_compiles_where_sizes_are_one(module, name, constants, tmp_path, monkeypatch):
    """Triton makes a constant of every argument that is 1 (one split, one tile across, ...), which
    has none of a tensor's methods; heads of 16 beside it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = getattr(pytest.importorskip(f"l2vit.models.ops.triton_{module}"), name).arg_names
    ones = {argument: 1 for argument in (*ONES, "chunk") if argument in arguments}
    narrow = {"D": 16} if module.endswith("attention") else {}
    assert build(module, name, constants | ones | narrow, "fp16", 90).asm["cubin"]


@pytest.fixture
def able(monkeypatch):
    """A CPU that passes for a GPU."""
    monkeypatch.setattr(gpu, "_DEVICES", ("cpu",))
    monkeypatch.setattr(gpu, "_capable", lambda index: True)
    monkeypatch.setattr(gpu, "_verdicts", {})

    def install(check):
        monkeypatch.setattr(gpu, "_check", lambda kernel: check)

    return install


def test_attention_of_more_windows_than_a_grid_takes(monkeypatch):
    monkeypatch.setattr(ops, "LARGEST_GRID", 3)
    torch.manual_seed(0)
    tokens = torch.randn(8, 49, 3 * 64)
    whole = ops.join_heads(ops.softmax_attention(*ops.split_qkv(tokens, 2)))
    torch.testing.assert_close(ops._in_parts(tokens, 2), whole)


def test_a_kernel_that_disagrees_is_left_alone(able):
    able(lambda device, dtype: ([torch.ones(3)], [torch.ones(3) * 1.1]))
    x = torch.randn(2, 40, 96)
    with pytest.warns(UserWarning, match="linear_attention is not used.*differs by 9"):
        out = ops.linear_attention(x, None, 1, 1.0)
    with ops.use_triton(False):
        assert torch.equal(out, ops.linear_attention(x, None, 1, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.may_run("linear_attention", x)


def test_a_kernel_that_fails_is_left_alone(able):
    def check(device, dtype):
        raise RuntimeError("out of resource\nand more")

    able(check)
    with pytest.warns(UserWarning, match="depthwise is not used.*RuntimeError: out of resource$"):
        assert not gpu.may_run("depthwise", torch.zeros(1))


def test_a_graph_being_captured_is_not_the_place_for_the_check(able, monkeypatch):
    able(lambda device, dtype: ([torch.ones(1)],) * 2)
    capturing = [True, False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.pop(0))
    assert [gpu.may_run("depthwise", torch.zeros(1)) for _ in range(3)] == [False, True, True]


def test_switch_and_types(able, monkeypatch):
    seen = []
    able(lambda device, dtype: (seen.append(dtype), ([torch.ones(1)],) * 2)[1])
    x = torch.zeros(1)
    with ops.use_triton(False):
        assert not gpu.may_run("depthwise", x)
    assert not gpu.may_run("depthwise", x.double()) and seen == []
    for _ in range(2):
        assert gpu.may_run("depthwise", x)
    assert seen == [torch.float32, torch.bfloat16, torch.float16]  # once, whatever x is
    monkeypatch.setattr(gpu, "_DEVICES", ("cuda",))
    assert not gpu.may_run("depthwise", x)


def test_a_flop_counter_sees_pytorchs_operators(able):
    able(lambda device, dtype: ([torch.ones(1)],) * 2)
    x = torch.zeros(1)
    with FlopCounterMode(display=False):
        assert not gpu.may_run("depthwise", x)
    assert gpu.may_run("depthwise", x)


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True)])
def test_switched_by_the_environment(value, on, monkeypatch):
    monkeypatch.setenv("L2VIT_TRITON", value)
    assert runpy.run_path(gpu.__file__)["_on"] is on


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["linear_attention", "depthwise"])
def test_agrees_on_this_gpu(kernel):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu._agrees(kernel, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_with_and_without_kernels_on_a_gpu(dtype):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("l2vit_mini").cuda().eval()
    images = torch.randn(2, 3, 96, 64, device="cuda")
    found = []
    for on in (True, False):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True)
        with ops.use_triton(on), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = compiled(images).float()
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), model.parameters())))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (5e-3 if dtype == torch.float32 else 5e-2) * b.norm() + 1e-5
