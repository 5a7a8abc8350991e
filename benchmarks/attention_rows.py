"""Two properties of attention rows that the papers argue about, measured.

Concentration: entropy of a row of attention weights over that of a uniform row (of absolute values
where weights are signed). Injectivity: the share of queries whose row stays the same (within 1e-3)
when that query is doubled, and the share of pairs of different queries of one image with the same
row. A row is what the attention itself gives the tokens; the convolutions that enhanced, focused
and injective attention have beside it are not in it.

The backbone is a DeiT of 4 blocks and 96 channels on scikit-learn's 1,797 scanned digits at 112
pixels (49 patches and a class token), trained with plain AdamW on all but the last 297.
"""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models.families.deit import Deit, TokenProjected

SAME = 1e-3
HELD_OUT = 297
EVERY = 10  # one query in so many is doubled at a time: SimA's norms run over all of them


def small_backbone(name: str, own: dict[str, Any]) -> Deit:
    """The small DeiT with this attention, random weights, ten classes."""
    torch.manual_seed(0)
    sizes = {"img_size": 112, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return Deit(num_classes=10, attention=name, **{**sizes, **own}).eval()


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The digits as (B, 3, 112, 112) in [−1, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (112, 112), mode="bilinear")
    return images.expand(-1, 3, -1, -1), torch.tensor(data.target)


def train(model: nn.Module, epochs: int) -> float:
    """AdamW, batches of 50, one cycle up to 1e-3; accuracy on the digits held out, in percent."""
    images, labels = digits()
    count = len(labels) - HELD_OUT
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=max(epochs * (count // 50), 1)
    )
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for ids in torch.randperm(count, generator=generator).split(50):
            loss = F.cross_entropy(model(images[ids]), labels[ids])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(images[count:]).argmax(1) == labels[count:]
    return 100 * right.float().mean().item()


@torch.no_grad()
def observe(model: Deit, images: Tensor) -> dict[str, float]:
    """Entropy and the two shares, averaged over images, blocks, heads and queries."""
    inputs: list[tuple[TokenProjected, Tensor]] = []
    hooks = [
        block.attn.register_forward_hook(lambda module, given, _: inputs.append((module, given[0])))
        for block in model.blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    found: dict[str, list[float]] = {"entropy": [], "same_when_doubled": [], "same_pairs": []}
    for attention, x in inputs:
        q, k, _ = attention.project(x, attention.grid)
        rows = attention.core.weights(q, k)
        found["entropy"].append(entropy(rows))
        found["same_when_doubled"].append(same_when_doubled(attention.core, q, k, rows))
        found["same_pairs"].append(same_pairs(q, rows))
    return {key: statistics.fmean(values) for key, values in found.items()}


def entropy(rows: Tensor) -> float:
    """Mean entropy of the rows (..., n) over log n: 1 is uniform, 0 a single token."""
    share = rows.abs() / rows.abs().sum(-1, keepdim=True).clamp(min=1e-30)
    nats = -(share * share.clamp(min=1e-30).log()).sum(-1)
    return (nats / torch.tensor(float(rows.shape[-1])).log()).mean().item()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖ over the larger length, along the last dimension; 0 for two rows of zeros."""
    longest = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
    return (a - b).norm(dim=-1) / longest.clamp(min=1e-30)


def same_when_doubled(core: nn.Module, q: Tensor, k: Tensor, rows: Tensor) -> float:
    """Share of queries (B, N, C) that, doubled, keep their row of ``rows`` (B, heads, N, n)."""
    same = []
    for first in range(EVERY):
        factor = torch.ones(q.shape[1], 1)
        factor[first::EVERY] = 2
        doubled = core.weights(q * factor, k)
        apart = distance(rows[:, :, first::EVERY], doubled[:, :, first::EVERY])
        same.append((apart < SAME).flatten())
    return torch.cat(same).float().mean().item()


def same_pairs(q: Tensor, rows: Tensor) -> float:
    """Share of pairs of queries that differ by more than 10 SAME and yet have the same row."""
    heads, n = rows.shape[1], rows.shape[2]
    queries = q.unflatten(2, (heads, -1)).transpose(1, 2)
    different = same = 0
    for shift in range(1, n // 2 + 1):
        apart = distance(queries, queries.roll(shift, 2)) > 10 * SAME
        equal = distance(rows, rows.roll(shift, 2)) < SAME
        different += int(apart.sum())
        same += int((apart & equal).sum())
    return same / max(different, 1)
