"""Accumulation and norms over many weights at once, against one weight after the other."""

import pytest
import torch

from l2vit.train.zero_foreach import use_foreach

SHAPES = (((4, 3), (5,)), ((2, 2, 3, 3),))


class BF16_Optimizer:
    """What of DeepSpeed's optimizer is touched: weights, flat gradients with padding, flags."""

    has_moe_layers = immediate_grad_update = False

    def __init__(self):
        self.bf16_groups = [
            [torch.nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes]
            for shapes in SHAPES
        ]
        self.fp32_groups_gradients_flat = [torch.zeros(20), torch.zeros(40)]
        self.fp32_groups_gradients = [
            list(flat[: sum(sizes)].split(sizes))
            for flat, group in zip(self.fp32_groups_gradients_flat, self.bf16_groups, strict=True)
            for sizes in [[p.numel() for p in group]]
        ]
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]

    def get_grads_for_norm(self, for_clipping=False): ...

    def update_hp_grads(self, clear_lp_grads=False): ...

    def clear_hp_grads(self): ...

    def clear_lp_grads(self, set_to_none=False): ...


@pytest.mark.parametrize("absent", [None, 0, 2])
@pytest.mark.parametrize("clear", [False, True])
def test_sums_of_three_micro_batches(absent, clear):
    torch.manual_seed(0)
    optimizer = BF16_Optimizer()
    assert use_foreach(optimizer)
    weights = [p for group in optimizer.bf16_groups for p in group]
    wide = [g for group in optimizer.fp32_groups_gradients for g in group]
    expected = [torch.zeros(p.numel()) for p in weights]
    for micro in range(3):
        for place, weight in enumerate(weights):
            weight.grad = None if place == absent else torch.randn_like(weight)
            if place == absent and micro == 1:  # it takes part in one micro-batch only
                weight.grad = torch.randn_like(weight)
            if weight.grad is not None:
                expected[place] += weight.grad.float().flatten()
        optimizer.update_hp_grads(clear_lp_grads=clear)
        if clear:
            assert all(p.grad is None or not p.grad.any() for p in weights)
    for got, wanted in zip(wide, expected, strict=True):
        assert torch.equal(got.flatten(), wanted)
    assert all(seen for group in optimizer.fp32_groups_has_gradients for seen in group)
    tensors, of_experts = optimizer.get_grads_for_norm()
    norm = torch.stack([t.norm() for t in tensors]).norm()
    assert norm == pytest.approx(torch.cat(expected).norm().item(), rel=1e-6) and of_experts == {}
    for flat in optimizer.get_grads_for_norm(for_clipping=True):
        flat.mul_(0.5)
    assert torch.equal(torch.cat([g.flatten() for g in wide]), 0.5 * torch.cat(expected))


def test_what_a_step_leaves_behind_does_not_count():
    """Not even where a weight has no gradient in the next one."""
    optimizer = BF16_Optimizer()
    gradients = use_foreach(optimizer)
    weights = [p for group in optimizer.bf16_groups for p in group]
    for weight in weights:
        weight.grad = torch.full_like(weight, float("nan"))
    optimizer.update_hp_grads()
    optimizer.clear_hp_grads()
    weights[1].grad = None
    for weight in (weights[0], weights[2]):
        weight.grad = torch.ones_like(weight)
    optimizer.update_hp_grads()
    gradients.settle(list(gradients.weights))
    wide = [g for group in optimizer.fp32_groups_gradients for g in group]
    assert [g.unique().tolist() for g in wide] == [[1.0], [0.0], [1.0]]


def test_other_optimizers_are_left_alone():
    class Other(BF16_Optimizer):
        pass

    other = Other()
    assert not use_foreach(other) and "update_hp_grads" not in vars(other)
    immediate = BF16_Optimizer()
    immediate.immediate_grad_update = True
    assert not use_foreach(immediate)
