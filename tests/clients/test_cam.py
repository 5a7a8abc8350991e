"""pytorch-grad-cam on our maps; runs where it is installed (pip install grad-cam)."""

import numpy as np
import pytest
import timm
import torch

from l2vit.models.backbone import reshape_transform


def test_maps_become_channels_first():
    maps = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    turned = reshape_transform(maps)
    assert turned.shape == (2, 5, 3, 4) and turned[1, 4, 2, 3] == maps[1, 2, 3, 4]


def test_grad_cam_follows_its_formula():
    cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(1)
    model = timm.create_model("l2vit_mini", num_classes=7).eval()
    images = torch.randn(1, 3, 96, 64)
    layer = model.stages[3]
    tool = cam.GradCAM(model, [layer], reshape_transform=reshape_transform)
    drawn = tool(images, [ClassifierOutputTarget(2)])[0]

    kept = []
    handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(out))
    score = model(images)[0, 2]
    handle.remove()
    gradient = torch.autograd.grad(score, kept[0])[0]
    weights = gradient.mean((1, 2))[0]  # Grad-CAM, eq. 1: one weight a channel
    expected = torch.relu((kept[0][0] * weights).sum(-1)).detach().numpy()
    assert drawn.shape == (96, 64)
    # The tool scales to 0 ... 1 and to the picture's size; the strongest cell is the same.
    cells = drawn.reshape(3, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(cells.argmax(), cells.shape) == np.unravel_index(
        expected.argmax(), expected.shape
    )
    assert np.corrcoef(cells.ravel(), expected.ravel())[0, 1] > 0.8
