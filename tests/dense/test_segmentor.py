"""UPerNet against one written here, and the loss against a plain sum."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2vit.dense.levels import make_levels
from l2vit.dense.segmentor import IGNORED, Segmentor, pixel_loss, synchronise_norms


def small(classes=5, **arguments):
    torch.manual_seed(0)
    levels = make_levels("l2vit_mini", stages=(0, 1, 2, 3), norms=False)
    return Segmentor(levels, classes=classes, channels=16, auxiliary_channels=8, **arguments)


def up(x, like):
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def plain_upernet(model, maps):
    """The definition: pyramid pooling, top-down path, every level to the finest, fused."""
    decoder = model.decoder

    def block(layer, x):
        conv, norm = layer[0], layer[1]
        x = F.conv2d(x, conv.weight.double(), None, padding=conv.padding)
        mean, var = norm.running_mean.double(), norm.running_var.double()
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + norm.eps).sqrt()
        return F.relu(x * norm.weight.double().view(-1, 1, 1) + norm.bias.double().view(-1, 1, 1))

    normed = []
    for x, norm in zip(maps, decoder.feature_norms, strict=True):
        x = x.double()
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        x = (x - mean) / (var + 1e-5).sqrt()
        normed.append(x * norm.weight.double().view(-1, 1, 1) + norm.bias.double().view(-1, 1, 1))
    top = normed[3]
    pooled = [
        up(block(branch[1], F.adaptive_avg_pool2d(top, side)), top)
        for side, branch in zip((1, 2, 3, 6), decoder.psp.blocks, strict=True)
    ]
    path = [block(decoder.psp.out_conv, torch.cat([top, *pooled], 1))]
    for x, lateral in zip(normed[2::-1], decoder.fpn_lateral_blocks, strict=True):
        lateral = block(lateral.conv_norm_relu, x)
        path.append(lateral + up(path[-1], lateral))
    outs = [path[0]] + [block(c, x) for c, x in zip(decoder.fpn_conv_blocks, path[1:], strict=True)]
    fused = torch.cat([up(x, outs[-1]) for x in outs[::-1]], 1)
    return block(decoder.fusion_block, fused)


def test_decoder_is_a_plain_upernet():
    model = small().eval()
    for module in model.decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        maps = [torch.randn(1, c, 36 >> i, 44 >> i) for i, c in enumerate(model.levels.channels)]
        found = model._decode(list(maps))
        torch.testing.assert_close(found.double(), plain_upernet(model, maps), atol=1e-4, rtol=1e-4)


def test_ignored_pixels_count_in_the_denominator():
    logits = torch.randn(2, 5, 8, 8)
    labels = torch.randint(0, 5, (2, 8, 8))
    labels[:, :4] = IGNORED
    logs = logits.double().log_softmax(1)
    total = 0.0
    for image in range(2):
        for y in range(4, 8):
            for x in range(8):
                total -= float(logs[image, labels[image, y, x], y, x])
    assert float(pixel_loss(logits, labels)) == pytest.approx(total / (2 * 8 * 8), rel=1e-6)


def test_a_batch_without_labels_has_a_loss_and_gradients():
    model = small().train()
    labels = torch.full((2, 64, 64), IGNORED)
    losses = model(torch.randn(2, 3, 64, 64), labels)
    sum(losses.values()).backward()
    assert all(float(loss.detach()) == 0 for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters())


def test_the_auxiliary_head_sees_the_normalised_third_stage():
    model = small().train()
    seen = {}
    model.auxiliary[0].register_forward_pre_hook(lambda m, x: seen.update(x=x[0]))
    losses = model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64))
    assert set(losses) == {"main", "auxiliary"}
    x = seen["x"]
    assert x.shape[1:] == (128, 4, 4)
    assert x.mean(1).abs().max() < 1e-4 and (x.var(1, correction=0) - 1).abs().max() < 1e-2


def test_the_auxiliary_loss_weighs_two_fifths():
    model = small().train()
    for head in (model.head, model.auxiliary):
        nn.init.zeros_(head[-1].weight)
    losses = model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64))
    assert float(losses["auxiliary"]) == pytest.approx(0.4 * float(losses["main"]))


@pytest.mark.parametrize("size", [(50, 70), (131, 64)])
def test_answers_have_the_pictures_own_size(size):
    model = small(short_side=64, long_side=256).eval()
    [answer] = model([torch.rand(3, *size)])
    assert answer.shape == size and answer.dtype == torch.int64


def test_sliding_over_a_picture_of_one_window_is_the_whole_picture():
    model = small(short_side=64, long_side=64, crop=64, stride=43).eval()
    picture = torch.rand(3, 64, 64)
    whole = model.segment(picture)
    model.mode = "slide"
    assert torch.equal(model.segment(picture), whole)


def test_sliding_averages_windows():
    model = small(short_side=64, long_side=128, crop=64, stride=43, mode="slide").eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 100)
        found = model._slide(x)
        left, right = model.logits(x[..., :64]), model.logits(x[..., 36:])
    torch.testing.assert_close(found[..., :36], left[..., :36])
    torch.testing.assert_close(found[..., 36:64], (left[..., 36:] + right[..., :28]) / 2)
    torch.testing.assert_close(found[..., 64:], right[..., 28:])


def test_all_norms_of_the_heads_and_none_of_the_backbone_are_synchronised():
    model = small()
    plain = sum(isinstance(m, nn.BatchNorm2d) for m in model.levels.modules())
    synchronise_norms(model)
    after = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert (
        len(after) == 4 + 1 + 3 + 3 + 1 + 1
    )  # pools, their fusion, laterals, outputs, fusion, aux
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == plain > 0
