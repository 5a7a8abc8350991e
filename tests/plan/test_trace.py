"""The traced micro-batch against the paper's counts and against what PyTorch really allocates."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import l2vit  # noqa: F401
from l2vit.plan.devices import Device
from l2vit.plan.recorder import Operation
from l2vit.plan.trace import Trace, trace


def traced(name: str, **options) -> Trace:
    classes = options.pop("classes", 1000)
    settings = {"batch": 2, "input_size": 224, "dtype": torch.bfloat16} | options
    return trace(lambda: timm.create_model(name, num_classes=classes), classes=classes, **settings)


@pytest.mark.parametrize(
    ("name", "giga", "millions"),
    [("l2vit_tiny", 4.688, 28.597), ("l2vit_small", 8.980, 50.199), ("l2vit_base", 15.808, 88.577)],
)
def test_forward_arithmetic_is_the_models(name, giga, millions):
    """Multiply-adds of matrix products and convolutions, checked by the authors' code."""
    found = traced(name, backward=False)
    assert found.flops / 2 / 2 / 1e9 == pytest.approx(giga, abs=0.0011)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.0006)


def test_backward_costs_two_more_forwards():
    forward, both = (traced("l2vit_tiny", backward=b).flops for b in (False, True))
    # A little less for the images' gradient nobody wants, a little more for what attention
    # kernels compute again.
    assert both == pytest.approx(3 * forward, rel=0.02)


def test_activations_are_what_pytorch_allocates():
    """The allocator's own books on the CPU, fp32: all that a forward pass leaves behind."""
    batch, size, classes = 4, 64, 100
    model = timm.create_model("l2vit_mini", num_classes=classes).train()
    images, targets = torch.randn(batch, 3, size, size), torch.rand(batch, classes)
    F.cross_entropy(model(images), targets).backward()  # gradients and caches exist from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as books:
        loss = F.cross_entropy(model(images), targets)
    allocated = sum(event.self_cpu_memory_usage for event in books.key_averages())
    predicted = traced(
        "l2vit_mini",
        batch=batch,
        input_size=size,
        classes=classes,
        dtype=torch.float32,
        on_gpu=False,
    )
    given = 4 * (images.numel() + targets.numel())  # counted by the trace, made before the books
    # Some layers have a form of their own on the CPU that keeps a little less.
    assert predicted.kept_bytes - given == pytest.approx(allocated, rel=0.04)
    assert predicted.peak_bytes >= predicted.kept_bytes
    loss.backward()


def test_memory_grows_with_the_batch_and_shrinks_with_precision():
    few, more = (traced("l2vit_mini", batch=b).kept_bytes for b in (2, 8))
    assert 3 < more / few < 4.05
    exact = traced("l2vit_mini", batch=8, dtype=torch.float32).kept_bytes
    assert 1.6 < exact / more < 2.05


@pytest.mark.gpu
def test_peak_is_what_a_gpu_allocates():
    batch = 16
    model = timm.create_model("l2vit_tiny").to("cuda", torch.bfloat16).train()
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    targets = torch.rand(batch, 1000, device="cuda")
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - images.nbytes - targets.nbytes
        F.cross_entropy(model(images).float(), targets).backward()
        peak = torch.cuda.max_memory_allocated() - before
    assert traced("l2vit_tiny", batch=batch).peak_bytes == pytest.approx(peak, rel=0.15)


def test_seconds_follow_whatever_binds():
    device = Device(
        "own", 80, matmul_tflops=100, vector_tflops=10, memory_tbs=1, node_gbs=1, network_gbs=1,
        images_per_second=1, matmul_share=0.5, vector_share=0.5, memory_share=0.5, issue_share=0.5,
        kernel_us=5, host_us=1,
    )  # fmt: skip
    cases = {
        Operation("mm", "", "matmul", flops=50e12): 1.0,
        Operation("conv", "", "vector", flops=50e12): 10.0,
        Operation("conv", "", "vector", flops=1.0, instructions=50e12): 20.0,
        Operation("add", "", bytes=1e12): 2.0,
        Operation("slow", "", bytes=1e12, memory_share=0.25): 8.0,
        Operation("mm", "", "matmul", flops=50e12, bytes=1e12): 2.0,
        Operation("add", "", bytes=1.0): 5e-6,
        Operation("empty", "allocation"): 0.0,
    }
    for operation, seconds in cases.items():
        assert device.device_seconds({operation: 1}) == pytest.approx(seconds), operation
    everything = Trace(dict.fromkeys(cases, 2), 1, 1, 0, 0, True)
    assert everything.seconds(device) == pytest.approx(2 * sum(cases.values()))
    single = Trace({Operation("mm", "", "matmul", flops=50e12): 1}, 1, 1, 0, 0, False)
    assert single.seconds(device) == pytest.approx(2.0)
    # A thousand small kernels: 5 µs each on the device, 1 µs each on the host that launches.
    many = {Operation("add", "", bytes=1.0): 1000}
    assert device.seconds(many) == pytest.approx(5e-3)
    slow_host = replace(device, host_us=20.0)
    assert slow_host.seconds(many) == pytest.approx(20e-3)
