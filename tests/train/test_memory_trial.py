"""The search for a micro-batch that fits, with a pretended device that runs out."""

import pytest
import torch

from l2vit.data.order import split
from l2vit.errors import ConfigError
from l2vit.train import model
from l2vit.train.config import EngineConfig


class World:
    """One of several ranks; ``others`` tells whether any other rank failed."""

    device, main, size = torch.device("cpu"), True, 2

    def __init__(self, others=0.0):
        self.others = others

    def max(self, value):
        return max(value, self.others)


def search(*, batch, largest, error, world=None):
    """Micro-batches tried, and the one that was found."""
    tried = []

    def loss(network, images, device):
        tried.append(images)
        if images > largest:
            raise error
        return network(torch.ones(1, 1)).sum()

    found = model.fit_micro_batch(
        torch.nn.Linear(1, 1),
        loss,
        split(batch, world=2, multiple_of=4),
        world=world or World(),
        engine=EngineConfig(precision="fp32"),
        averages=False,
        multiple_of=4,
    )
    return tried, found


def test_starts_at_512_images_however_many_a_rank_has():
    tried, found = search(batch=8192, largest=200, error=torch.OutOfMemoryError("o"))
    assert tried == [512, 256, 128]
    assert (found.micro_batch, found.accumulation, found.global_batch) == (128, 32, 8192)
    tried, found = search(batch=256, largest=200, error=None)
    assert tried == [128]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        type("OutOfResources", (Exception,), {})("out of resource: shared memory"),
    ],
)
def test_a_refused_launch_counts_as_too_large(error, capsys):
    _, found = search(batch=512, largest=100, error=error)
    assert found.micro_batch == 64
    assert str(error) in capsys.readouterr().out


def test_another_error_is_not_taken_for_a_lack_of_memory():
    wrong = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot"):
        search(batch=512, largest=0, error=wrong)


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"even with 4 images \(no room\)"):
        search(batch=512, largest=0, error=torch.OutOfMemoryError("no room"))


def test_all_ranks_go_down_with_the_one_that_failed():
    with pytest.raises(ConfigError, match="another rank"):
        search(batch=512, largest=512, error=None, world=World(others=1.0))
