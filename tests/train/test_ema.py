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
    for _ in range(200):
        with torch.no_grad():
            for tensor in sources:
                tensor.add_(torch.randn_like(tensor), alpha=0.01)
        ours.update()
        theirs.update(net)
    state = dict(theirs.module.named_parameters()) | dict(theirs.module.named_buffers())
    expected = [tensor for tensor in state.values() if tensor.is_floating_point()]
    for mine, other in zip(ours.averages, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
