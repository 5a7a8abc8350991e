import json

import numpy as np
import pytest
import timm
import torch
from digit_models import make_model
from PIL import Image
from torch import nn

from finetune import figures, look, maps
from l2vit.errors import UserError
from l2vit.models.l2vit import LinearAttention, WindowAttention
from l2vit.train.weights import read_pretrained


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs_seen(model, images):
    """What each attention layer got and gave before its projection, on the first image."""
    seen = {}
    handles = []
    for name, module in maps.attention_layers(model).items():

        def hook(layer, inputs, output, name=name):
            seen[name] = (layer, inputs[0].detach(), output.detach())

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(images[:1])
    for handle in handles:
        handle.remove()
    return seen


def test_every_map_times_the_values_is_the_layers_output(model, images, inputs_seen):
    """Sec. 11: the q-k-first form is the same function. Checked layer by layer, per head."""
    found = {m.layer: m for m in maps.attention_maps(model, images[:1])}
    assert list(found) == list(inputs_seen) and len(found) == 8
    for name, (layer, x, _) in inputs_seen.items():
        output = layer(x)  # what the hook saw has the block's residual in it
        tokens = x.reshape(1, -1, x.shape[-1])
        channels, heads = x.shape[-1], layer.num_heads
        value = layer.qkv(tokens)[..., 2 * channels :]
        value = value.view(tokens.shape[1], heads, -1).transpose(0, 1)
        if isinstance(layer, LinearAttention):
            weights = layer.attention_map(x)[0]
            assert found[name].kind == "linear"
        else:
            assert isinstance(layer, WindowAttention) and found[name].kind == "window"
            weights = maps.window_map(layer, x)[0]
            if x.shape[1] % layer.window_size:
                # padded positions have values too (the bias of v): the rest of each row's weight
                rest = 1 - weights.sum(-1, keepdim=True)
                padding = layer.qkv.bias[2 * channels :].view(heads, 1, -1)
                value_of_padding = rest * padding
            else:
                assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
                value_of_padding = 0
        mixed = weights @ value + (value_of_padding if found[name].kind == "window" else 0)
        expected = layer.proj(mixed.transpose(0, 1).reshape(1, -1, channels))
        assert torch.allclose(expected.view(output.shape), output, atol=1e-4), name
        assert torch.allclose(found[name].weights, weights.mean(0), atol=1e-6)


def test_window_maps_are_zero_between_windows(model, inputs_seen):
    layer, x, _ = inputs_seen["stages.0.blocks.0.attn"]
    weights = maps.window_map(layer, x)[0].mean(0).view(12, 12, 12, 12)
    for row, column in ((0, 0), (5, 6), (11, 3)):
        inside = torch.zeros(12, 12, dtype=torch.bool)
        top, left = row // 6 * 6, column // 6 * 6
        inside[top : top + 6, left : left + 6] = True
        assert bool((weights[row, column][~inside] == 0).all())
        assert bool((weights[row, column][inside] > 0).all())


def test_large_maps_are_left_out(model, images):
    names = [m.layer for m in maps.attention_maps(model, images[:1], max_tokens=36)]
    assert names[0].startswith("stages.1")


class Toy(nn.Module):
    """Two feature channels whose class scores are known: Grad-CAM can be written down."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()
        self.feature_info = [{"module": "body"}]
        self.scores = nn.Parameter(torch.tensor([[2.0, -1.0], [-3.0, 0.5]]))

    def forward(self, x):
        return self.body(x[:, :2] * 1.0).mean((2, 3)) @ self.scores.T


def test_grad_cam_is_selvarajus_formula():
    toy = Toy().eval()
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    for wanted in (0, 1):
        found = maps.grad_cam(toy, images, classes=torch.tensor([wanted, wanted]))
        weights = toy.scores.detach()[wanted] / 24
        cam = torch.relu(weights[0] * images[:, 0] + weights[1] * images[:, 1])
        cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
        assert torch.allclose(found, cam, atol=1e-5)


def test_grad_cam_of_the_network(model, images):
    """Against the gradient by finite differences, through everything after the last stage."""
    wanted = torch.tensor([1, 2, 3])
    found = maps.grad_cam(model, images, classes=wanted)
    assert found.shape == (3, 48, 48) and float(found.min()) >= 0 and float(found.max()) <= 1
    double = make_model().double()
    with torch.no_grad():
        x = double.stem(images.double())
        for stage in double.stages:
            x = stage(x)
        features = x

        def rest(a):
            return double.forward_head(double.norm(a)).gather(1, wanted[:, None])[:, 0]

        weights = torch.zeros(3, features.shape[3], dtype=torch.float64)
        for channel in range(features.shape[3]):
            step = torch.zeros_like(features)
            step[..., channel] = 1e-5
            weights[:, channel] = (rest(features + step) - rest(features - step)) / 2e-5
        cam = torch.relu((weights[:, None, None] * features).sum(3))
        cam = nn.functional.interpolate(cam[:, None], (48, 48), mode="bilinear")[:, 0]
        cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
    assert torch.allclose(found.double(), cam, atol=1e-3)


def test_grad_cam_names_what_is_no_layer(model, images):
    with pytest.raises(UserError, match=r"no layer 'stages\.9'"):
        maps.grad_cam(model, images, "stages.9")
    with pytest.raises(UserError, match="no feature map"):
        maps.grad_cam(model, images, "head")


def test_share_of_clamped_denominators_by_hand(model, images, inputs_seen):
    """One image: q · Σk with explicit sums, in every linear layer."""
    shares = maps.clamped_shares(model, images[:1])
    linear = {n: v for n, v in inputs_seen.items() if isinstance(v[0], LinearAttention)}
    assert shares.keys() == linear.keys()
    for name, (layer, x, _) in linear.items():
        channels = x.shape[-1]
        qkv = layer.qkv(x)[0].detach().flatten(0, -2).double().relu()
        q, k = qkv[:, :channels], qkv[:, channels : 2 * channels]
        below = []
        for head in range(layer.num_heads):
            own = slice(32 * head, 32 * head + 32)
            below += [float(token @ k[:, own].sum(0)) < 100 for token in q[:, own]]
        assert shares[name] == pytest.approx(np.mean(below), abs=1.5 / len(below))
    assert all(module.observer is None for module, _, _ in linear.values())
    assert 0 < np.mean(list(shares.values())) < 1


def test_the_program_leaves_pictures_and_tensorboard(run, shards, tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "look"
    arguments = ["--model", str(run), "--images", str(shards), "--count", "3", "--out", str(out)]
    assert look.main(arguments) == 0
    for name in ("grad_cam", "attention", "clamped"):
        pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert pixels.std() > 10
    events = EventAccumulator(str(out))
    events.Reload()
    assert set(events.Tags()["images"]) == {"look/grad_cam", "look/attention", "look/clamped"}
    shares = json.loads((out / "clamped.json").read_text())
    assert f"look/clamped_share/{next(iter(shares))}" in events.Tags()["scalars"]
    assert "% of denominators clamped" in capfd.readouterr().out


def test_class_to_explain_by_wnid_name_or_number(run, shards, tmp_path, capfd):
    source = read_pretrained(run)
    for wanted in ("n90000004", "four", "4"):
        assert figures._wanted(source, wanted, 2).tolist() == [4, 4]
    base = ["--model", str(run), "--images", str(shards), "--count", "1", "--out", str(tmp_path)]
    assert look.main([*base, "--class", "unicorn"]) == 2
    assert "unicorn" in capfd.readouterr().err


HOSTS = {
    "flatten_swin_mini": ({"window_size": 4}, [(16, 16)] * 2 + [(8, 8)] * 2),
    "inline_cswin_tiny": (
        {"window_size": 2, "depths": (1, 1, 1, 1)},
        [(16, 16), (8, 8), (2, 2)],  # the third stage works in stripes
    ),
    "inline_pvt_tiny": ({"depths": (1, 1, 1, 1)}, [(16, 16), (8, 8), (4, 4), (2, 2)]),
    "deit_tiny_softmax": ({"depth": 2}, [(4, 4)] * 2),
}


@pytest.mark.parametrize("name", HOSTS)
def test_other_hosts_are_looked_at_where_they_see_the_whole_picture(name):
    arguments, grids = HOSTS[name]
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, img_size=64, **arguments).eval()
    image = torch.randn(1, 3, 64, 64)
    found = maps.attention_maps(network, image)
    assert [m.grid for m in found] == grids
    for each in found:
        tokens = each.grid[0] * each.grid[1]
        assert each.weights.shape == (tokens, tokens)
        assert each.of_token(0, 0).shape == each.grid
        # a class token takes its share
        prefix = name.startswith("deit")
        total = each.weights.sum(1)
        assert (total < 1).all() if prefix else torch.allclose(total, torch.ones(tokens), atol=1e-3)
    cam = maps.grad_cam(network, image)
    assert cam.shape == (1, 64, 64) and cam.max() == 1


def test_grad_cam_of_tokens_leaves_the_class_token_out():
    """At the last block's first norm, from the gradient by finite differences."""
    torch.manual_seed(0)
    network = timm.create_model("deit_tiny_softmax", num_classes=5, img_size=64, depth=1)
    network = network.double().eval()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    found = maps.grad_cam(network, image, classes=torch.tensor([2]))
    block = network.blocks[0]
    with torch.no_grad():
        x = network._pos_embed(network.patch_embed(image))
        tokens = block.norm1(x)

        def score(t):
            y = x + block.attn(t)
            y = y + block.mlp(block.norm2(y))
            return network.head(network.norm(y)[:, 0])[0, 2]

        weights = torch.zeros(192, dtype=torch.float64)
        for channel in range(192):
            step = torch.zeros_like(tokens)
            step[:, 1:, channel] = 1e-5
            weights[channel] = (score(tokens + step) - score(tokens - step)) / 2e-5
        cam = torch.relu((weights * tokens[:, 1:]).sum(2)).view(1, 1, 4, 4)
        cam = nn.functional.interpolate(cam, (64, 64), mode="bilinear")[:, 0]
    assert torch.allclose(found.double(), cam / cam.max(), atol=1e-4)
