"""Compilers, exporters and the libraries that take backbones."""

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.backends.common import aot_autograd

import l2vit  # noqa: F401
from l2vit.models.export import export_any_size

SIZES = [(1, 75, 131), (3, 64, 64), (2, 33, 250), (1, 224, 224), (2, 34, 33)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("l2vit_mini", num_classes=5).eval()


@pytest.mark.parametrize(
    ("backend", "depths"),
    [
        ("eager", (2, 2, 2, 2)),
        ("aot_eager", (2, 2, 2, 2)),
        pytest.param("inductor", (2, 2), marks=pytest.mark.slow),  # minutes of C++
    ],
)
def test_compiles_into_one_graph(backend, depths, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    plain = timm.create_model("l2vit_mini", num_classes=5, depths=depths)
    images = torch.randn(2, 3, 96, 64)
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    results = []
    for call in (plain, compiled):
        plain.load_state_dict(plain.state_dict())
        plain.zero_grad()
        loss = call(images).square().sum()
        loss.backward()
        results.append((loss, {n: p.grad.clone() for n, p in plain.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_compiles_with_gradient_checkpointing():
    """Gradients and what BatchNorm has seen are those of the plain model."""
    torch.manual_seed(0)
    plain = timm.create_model("l2vit_mini", num_classes=5, depths=(2,)).double()
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing(True)
    compiled = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
    images, seen = torch.randn(2, 3, 40, 64, dtype=torch.float64), []
    for call, model in ((compiled, recomputed), (plain, plain)):
        call(images).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        seen.append(gradients | dict(model.named_buffers()))
    torch.testing.assert_close(*seen, rtol=1e-7, atol=1e-9)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def short():
    """Both kinds of blocks and a down-sampling."""
    torch.manual_seed(0)
    return timm.create_model("l2vit_mini", num_classes=5, depths=(2, 2)).eval()


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("short", 224, 0),
        ("short", 75, 1 + 1 + 2),  # the image, the down-sampling, the window attentions
        pytest.param("model", 224, 0, marks=pytest.mark.slow),
    ],
)
def test_compiled_graph_pads_only_what_must_be_padded(name, size, expected, request):
    """A needless pad is a copy of the feature map."""
    plain, graphs = request.getfixturevalue(name), []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(plain, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-3, atol=1e-4)
    (targets,) = graphs
    assert sum("constant_pad" in target for target in targets) == expected
    torch.compiler.reset()


@pytest.mark.slow
def test_compiles_for_any_size(short):
    compiled = torch.compile(short, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 75, 131), (3, 3, 98, 150)):
            images = torch.randn(shape)
            torch.testing.assert_close(compiled(images), short(images), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_export_with_any_size(short):
    module = export_any_size(short, torch.randn(2, 3, 75, 131)).module(check_guards=False)
    for count, *size in SIZES:
        images = torch.randn(count, 3, *size)
        torch.testing.assert_close(module(images), short(images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_whole_model_with_any_size(model, tmp_path):
    """Through a .pt2 file, and through ONNX in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = export_any_size(model, torch.randn(2, 3, 75, 131))
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module(check_guards=False)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, (), path, input_names=["images"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for count, *size in [*SIZES, (1, 800, 1333)]:
        images = torch.randn(count, 3, *size)
        with torch.no_grad():
            expected = model(images)
            torch.testing.assert_close(module(images), expected, rtol=1e-3, atol=1e-4)
        (got,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_export_with_any_batch(model):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 75, 131),), dynamic_shapes=({0: batch},)
    )
    for count in (1, 5):
        images = torch.randn(count, 3, 75, 131)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [64, 56])
def test_a_trace_takes_images_of_any_size(model, side):
    """What is padded where the trace was made must not decide what is padded elsewhere."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(1, 3, side, side))
        for count, *size in [*SIZES, (1, 1, 1), (2, 32, 32)]:
            images = torch.randn(count, 3, *size)
            torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def test_onnx_by_trace_takes_images_of_any_size(short, tmp_path):
    """The exporter of old, which timm's onnx_export.py uses unless told otherwise."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            short,
            (torch.randn(1, 3, 64, 64),),
            path,
            dynamo=False,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}},
        )
    session = onnxruntime.InferenceSession(path)
    for count, *size in SIZES:
        images = torch.randn(count, 3, *size)
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, short(images).numpy(), rtol=1e-4, atol=1e-5)


def test_onnx_runs_in_onnxruntime(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = torch.randn(2, 3, 96, 64)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=True,
            input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path)
    for count in (2, 7):
        images = torch.randn(count, 3, 96, 64)
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, model(images).numpy(), rtol=1e-3, atol=1e-4)


PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_lines_of_the_page_run():
    """The uses in timm, torchvision and segmentation_models_pytorch, as docs/models.md has them."""
    section = PAGE.read_text().partition("### In other libraries")[2].partition("### How")[0]
    blocks = [part.partition("```")[0] for part in section.split("```python")[1:]]
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        if "segmentation_models" in block and not find_spec("segmentation_models_pytorch"):
            pytest.skip("segmentation_models_pytorch is not installed; the other uses ran")
        assert len(block.strip().splitlines()) <= 10
        exec(block, names)
    assert names["boxes"].shape[1] == 4
