"""The moving average against timm's, fed the same weights."""

import pytest
import torch
from timm.utils import ModelEmaV3

from l2vit.train.ema import Ema


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_equals_timms_average_of_the_same_masters(decay):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    sources = [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]
    ours, theirs = Ema(sources, decay), ModelEmaV3(net, decay=decay)
    for step in range(200):
        with torch.no_grad():
            for tensor in sources:
                tensor.add_(torch.randn_like(tensor), alpha=0.01)
        ours.update(step + 1)
        theirs.update(net)
    state = dict(theirs.module.named_parameters()) | dict(theirs.module.named_buffers())
    expected = [tensor for tensor in state.values() if tensor.is_floating_point()]
    for mine, other in zip(ours.averages, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_warming_average_forgets_the_first_weights():
    """Against the definition in float64; a constant 0.9999 keeps 98% of them after 200 steps."""
    source = torch.zeros(1)
    averages = {warm: Ema([source], 0.9999, warmup=warm) for warm in (False, True)}
    for average in averages.values():
        average.averages[0].fill_(1.0)
    expected = 1.0
    for step in range(1, 201):
        expected *= min(0.9999, (1 + step) / (10 + step))
        for average in averages.values():
            average.update(step)
    assert expected < 1e-6
    assert averages[True].averages[0].item() == pytest.approx(expected, rel=1e-4)
    assert averages[False].averages[0].item() == pytest.approx(0.9999**200, rel=1e-4)
