"""The network against a float64 transcription of the paper, and timm's contract."""

import pytest
import timm
import torch
from l2vit_reference import MINI, our_names, reference
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import l2vit  # noqa: F401
from l2vit.models.l2vit import LinearAttention, WindowAttention
from l2vit.models.layers import BatchNorm2d


def ours(paper, dtype=torch.float64, **arguments):
    model = timm.create_model("l2vit_mini", num_classes=11, **arguments).to(dtype)
    model.load_state_dict(our_names(paper.state_dict()))
    return model.eval()


@pytest.mark.parametrize(
    "size",
    [
        *((32, 32), (224, 224), (75, 131), (33, 250), (1, 1)),
        pytest.param((800, 1333), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("window", [7, 4])
def test_equals_the_paper_at_any_input_size(size, window):
    paper = reference(window=window)
    model = ours(paper, window_size=window)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(images), paper(images), rtol=1e-9, atol=1e-9)


def test_every_stage_and_gradient_equals_the_paper():
    paper = reference().train()
    model = ours(paper).train()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    tokens, height, width = images, 64, 96
    stages = []
    for down, blocks in zip(paper.downsample_layers, paper.stages, strict=True):
        tokens, height, width = down(tokens, height, width)
        for block in blocks:
            tokens = block(tokens, height, width)
        stages.append(tokens.transpose(1, 2).unflatten(2, (height, width)))
    final, intermediates = model.forward_intermediates(images)
    for got, expected in zip(intermediates, stages, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(3, 11, dtype=torch.float64)
    (paper.head(paper.norm(tokens).mean(1)) * weights).sum().backward()
    (model.forward_head(final) * weights).sum().backward()
    expected = our_names({name: p.grad for name, p in paper.named_parameters()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-9)
    buffers = our_names(dict(paper.named_buffers()))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_paths_agree_with_float64(dtype):
    """A map of 56×56: the weight gradient by columns, and every window without padding."""
    paper = reference()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    expected = paper(images)
    model = ours(paper, dtype)
    bound = 1e-4 if dtype == torch.float32 else 6e-2
    with torch.no_grad():
        got = model(images.to(dtype)).double()
    assert (got - expected).norm() / expected.norm() < bound
    paper.train()(images).square().sum().backward()
    model.train()(images.to(dtype)).double().square().sum().backward()
    wanted = our_names({name: p.grad for name, p in paper.named_parameters()})
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            got, expected = parameter.grad.double(), wanted[name]
            similarity = nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0)
            assert similarity > (0.9999 if dtype == torch.float32 else 0.9), name


def test_arguments_reach_every_block():
    model = timm.create_model(
        "l2vit_mini", window_size=5, clamp=7.0, order="qk", drop_path_rate=0.7
    )
    windows = [m for m in model.modules() if isinstance(m, WindowAttention)]
    linears = [m for m in model.modules() if isinstance(m, LinearAttention)]
    assert len(windows) == len(linears) == 4
    assert {m.window_size for m in windows} == {5}
    assert {(m.clamp, m.order) for m in linears} == {(7.0, "qk")}
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for s in model.stages for block in s.blocks]
    assert rates == pytest.approx([i / 10 for i in range(8)])
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is None or not module.bias.any()
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_window_and_size_change_no_parameter():
    model = timm.create_model("l2vit_mini").eval()
    before = {name: p.shape for name, p in model.named_parameters()}
    other = timm.create_model("l2vit_mini", img_size=384, window_size=12).eval()
    assert {name: p.shape for name, p in other.named_parameters()} == before
    other.load_state_dict(model.state_dict())
    model.set_input_size(img_size=384, window_size=12)
    assert model.img_size == (384, 384)
    images = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(model(images), other(images))


def test_timms_contract():
    images = torch.randn(2, 3, 64, 96)
    features = timm.create_model("l2vit_mini", features_only=True, out_indices=(0, 2, 3))
    assert features.feature_info.reduction() == [4, 16, 32]
    for got, info in zip(features(images), (32, 128, 256), strict=True):
        assert got.shape[1] == info
    model = timm.create_model("l2vit_mini", num_classes=5, drop_rate=0.1).eval()
    final, stages = model.forward_intermediates(images, indices=[1, 3], norm=True)
    assert [s.shape for s in stages] == [(2, 64, 8, 12), (2, 256, 2, 3)]
    torch.testing.assert_close(stages[1].permute(0, 2, 3, 1), final)
    torch.testing.assert_close(final, model.forward_features(images))
    torch.testing.assert_close(model.forward_head(final), model(images))
    pooled = model.forward_head(final, pre_logits=True)
    torch.testing.assert_close(pooled, final.mean((1, 2)))
    early = model.forward_intermediates(
        images, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NHWC"
    )
    assert [e.shape for e in early] == [(2, 16, 24, 32)]
    assert model.no_weight_decay() == set()
    model.reset_classifier(3, "max")
    assert model(images).shape == (2, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 2, 3, 256)
    for channels in (1, 4):
        grey = timm.create_model("l2vit_mini", in_chans=channels, global_pool="max")
        assert grey(torch.randn(2, channels, 40, 40)).shape == (2, 1000)


def test_layer_decay_sees_depth():
    model = timm.create_model("l2vit_mini")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    order = ["stem.norm.weight", *(f"stages.{s}.blocks.{b}.mlp.fc1.weight" for s in range(4)
                                   for b in range(2)), "head.fc.weight"]  # fmt: skip
    depths = [groups[name] for name in order]
    assert depths == sorted(depths) and len(set(depths[:-1])) == len(depths) - 1
    scales = {g["lr_scale"] for g in param_groups_layer_decay(model, 0.05, layer_decay=0.5)}
    assert len(scales) >= 9
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) < len(set(groups.values()))


def test_checkpointing_changes_nothing():
    """Not the gradients, not what BatchNorm has seen, whatever is dropped on the way."""
    images = torch.randn(4, 3, 64, 64)
    seen = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("l2vit_mini", drop_path_rate=0.3).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model(images).square().mean().backward()
        state = {name: p.grad for name, p in model.named_parameters()}
        seen.append({**state, **dict(model.named_buffers())})
    for name, expected in seen[0].items():
        torch.testing.assert_close(seen[1][name], expected, msg=name)


def test_names_and_tags():
    names = timm.list_models("l2vit_*")
    assert {"l2vit_tiny", "l2vit_small", "l2vit_base", "l2vit_mini"} <= set(names)
    big = timm.create_model("l2vit_base.in22k_ft_in1k_384", depths=(2, 2, 2, 2))
    assert big.img_size == (384, 384) and big.stages[0].blocks[0].attn.window_size == 12
    cfg = timm.data.resolve_model_data_config(big)
    assert cfg["input_size"] == (3, 384, 384) and cfg["crop_mode"] == "squash"
    assert cfg["crop_pct"] == 1.0 and cfg["interpolation"] == "bicubic"
    assert timm.create_model("l2vit_base.in22k", depths=(1, 1, 1, 1)).num_classes == 21841
    plain = timm.data.resolve_model_data_config(timm.create_model("l2vit_mini"))
    assert plain["input_size"] == (3, 224, 224) and plain["crop_pct"] == 0.875


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights_stay_finite(dtype):
    """Activations of thousands over 3,136 tokens: kᵀ v passes fp16's 65,504 many times over."""
    torch.manual_seed(0)
    model = timm.create_model("l2vit_mini", num_classes=7).eval()
    images = torch.randn(1, 3, 224, 224)
    attention = model.stages[0].blocks[1].attn
    with torch.no_grad():
        attention.qkv.weight.mul_(4000)
    expected = model(images)
    with torch.autocast("cpu", dtype):
        mixed = model(images).float()
    assert (mixed - expected).norm() / expected.norm() < 0.05
    half = model.to(dtype)
    for module in half.modules():
        if isinstance(module, BatchNorm2d):
            assert module.running_var.dtype == torch.float32
    low = half(images.to(dtype)).float()
    assert (low - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_training_has_the_gradients_of_fp32(dtype):
    """With the loss scaled as a GradScaler would: fp16 loses small gradients otherwise."""
    torch.manual_seed(0)
    model = timm.create_model("l2vit_mini", num_classes=7, depths=(2, 2))
    images, labels = torch.randn(4, 3, 96, 64), torch.arange(4)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        gradients = torch.autograd.grad(1024 * loss, list(model.parameters()))
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert (found[1] - found[0]).norm() / found[0].norm() < 0.05


def test_channels_last_from_stem_to_head():
    """No convolution gets, and none returns, a tensor that would have to be copied."""
    model = timm.create_model("l2vit_mini").eval()
    seen = []

    def look(module, inputs, output):
        # The first convolution alone is given what the user has.
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for name, module in model.named_modules():
        if type(module) is nn.Conv2d or isinstance(module, BatchNorm2d):
            module.register_forward_hook(look)
        if name.endswith(("cpe1", "cpe2", "lcm")):
            module.register_forward_hook(lambda _, i, o: seen.append(o.is_contiguous()))
    model(torch.randn(2, 3, 64, 64))
    assert len(seen) > 20 and all(seen)


def test_mini_learns():
    torch.manual_seed(0)
    model = timm.create_model("l2vit_mini", num_classes=2)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert MINI[0] == model.feature_info[0]["num_chs"]


def small_with_paths(**arguments):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depths": (2, 2), "num_classes": 3, "drop_path_rate": 0.6}
    model = timm.create_model("l2vit_tiny", **sizes, **arguments).train()
    model.draws_paths_at_once = True
    return model


def test_paths_drawn_at_once_have_each_blocks_rate():
    """Each branch of each image is kept with its block's probability, then divided by it."""
    model = small_with_paths()
    drawn = model.draw_paths(torch.zeros(4000, 1, 1, 32))
    factors = torch.cat(list(drawn))
    assert [len(part) for part in drawn] == [2, 2] and factors.shape == (4, 3, 4000)
    for rate, block in zip((0.0, 0.2, 0.4, 0.6), factors, strict=True):
        expected = torch.tensor(1 / (1 - rate))
        kept = block != 0
        torch.testing.assert_close(block[kept], expected.expand(int(kept.sum())))
        assert (kept.float().mean(1) - (1 - rate)).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert not torch.equal(factors[3, 0], factors[3, 1])
    model.eval()
    assert model.draw_paths(torch.zeros(2, 1, 1, 32)) == [None, None]


def test_a_dropped_branch_adds_nothing_and_gets_no_gradient():
    block = small_with_paths().stages[1].blocks[0]
    x = torch.randn(2, 4, 4, 64)
    kept = torch.tensor([[0.0, 2.5]] * 3)
    out = block(x, kept)
    position = block.cpe2(block.cpe1(x))
    torch.testing.assert_close(out[0], position[0])
    branch = block.cpe1(x)
    branch = block.cpe2(branch + 2.5 * block.attn(block.norm1(branch)))
    torch.testing.assert_close(out[1], (branch + 2.5 * block.mlp(block.norm2(branch)))[1])
    (grad,) = torch.autograd.grad(out[0].sum(), block.mlp.fc1.weight)
    assert not grad.any()


def test_recomputing_keeps_the_paths_drawn_at_once():
    images, found = torch.randn(2, 3, 32, 32), []
    for recompute in (False, True):
        model = small_with_paths()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
