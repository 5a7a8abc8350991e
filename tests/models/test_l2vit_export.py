"""Compilers, exporters and the libraries that take backbones."""

import warnings

import numpy as np
import pytest
import timm
import torch

import l2vit  # noqa: F401

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("l2vit_mini", num_classes=5).eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    torch.manual_seed(0)
    plain = timm.create_model("l2vit_mini", num_classes=5)
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


def test_export_with_any_batch(model):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 75, 131),), dynamic_shapes=({0: batch},)
    )
    for count in (1, 5):
        images = torch.randn(count, 3, 75, 131)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-3, atol=1e-4)


def test_traces(model):
    images = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-3, atol=1e-4)


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


# The three uses that docs/models.md shows, line for line.


def test_use_in_timm():

    model = timm.create_model("l2vit_mini", features_only=True, out_indices=(1, 2, 3))
    maps = model(torch.randn(1, 3, 128, 96))
    assert [m.shape[1:] for m in maps] == [(64, 16, 12), (128, 8, 6), (256, 4, 3)]


def test_use_in_torchvision_detection():
    from torchvision.models.detection import FasterRCNN
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(torch.nn.Module):
        out_channels = 256

        def __init__(self):
            super().__init__()
            self.body = timm.create_model("l2vit_mini", features_only=True)
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 256)

        def forward(self, x):
            return self.fpn({str(i): f for i, f in enumerate(self.body(x))})

    detector = FasterRCNN(Backbone(), num_classes=3, min_size=128, max_size=200,
                          rpn_anchor_generator=anchors()).eval()  # fmt: skip
    with torch.no_grad():
        (found,) = detector([torch.rand(3, 120, 170)])
    assert set(found) == {"boxes", "labels", "scores"}


def anchors():
    from torchvision.models.detection.rpn import AnchorGenerator

    return AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4)


def test_use_in_segmentation_models():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.FPN("tu-l2vit_mini", encoder_weights=None, classes=4)
    assert model(torch.randn(2, 3, 128, 96)).shape == (2, 4, 128, 96)
