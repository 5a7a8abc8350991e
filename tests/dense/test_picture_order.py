"""The order of pictures: groups of one orientation, every picture, any number of ranks."""

import numpy as np
import pytest

from l2vit.data.order import Share, Split
from l2vit.dense.order import GroupedOrder
from l2vit.errors import ConfigError, UserError


def kinds(count=37, seed=0):
    return np.random.default_rng(seed).random(count) < 0.3


def make(which=None, **changes):
    arguments = {"seed": 5, "group": 2, "global_batch": 8, **changes}
    return GroupedOrder("data", kinds() if which is None else which, **arguments)


def test_every_picture_is_there_in_pairs_of_one_orientation():
    order, which = make(), kinds()
    for epoch in range(3):
        ids = order.epoch_ids(epoch)
        assert set(ids.tolist()) == set(range(37))
        pairs = ids.reshape(-1, 2)
        assert (which[pairs[:, 0]] == which[pairs[:, 1]]).all()
        counts = np.bincount(ids)
        assert counts.max() <= 2 and len(ids) == order.steps_per_epoch * 8
    assert (order.epoch_ids(0) != order.epoch_ids(1)).any()


def test_a_lone_picture_of_its_kind_is_repeated():
    which = np.array([True] * 6 + [False])
    ids = make(which).epoch_ids(0).reshape(-1, 2)
    assert [6, 6] in ids.tolist()


@pytest.mark.parametrize("portraits", [0, 1, 30_000, 58_633])
def test_coco_gives_the_published_number_of_steps(portraits):
    """117,266 of train2017's 118,287 pictures have annotations: 7,330 steps of 16."""
    which = np.zeros(117_266, bool)
    which[:portraits] = True
    assert make(which, global_batch=16).steps_per_epoch == 7330


def test_the_order_knows_nothing_of_ranks():
    order = make(global_batch=16)
    whole = order.epoch_ids(2)
    for world, micro, accumulation in ((1, 16, 1), (2, 4, 2), (4, 2, 2), (8, 2, 1)):
        split = Split(micro, accumulation, world)
        steps = []
        for step in range(order.steps_per_epoch):
            epoch, ids = order.batch_ids((2 * order.steps_per_epoch + step) * 16)
            assert epoch == 2
            parts = [
                ids[Share(rank, split).places(micro_step)]
                for micro_step in range(accumulation)
                for rank in range(world)
            ]
            steps.append(np.concatenate(parts))
        assert np.array_equal(np.concatenate(steps), whole)


def test_fingerprints_differ_where_orders_do():
    same = {make().fingerprint, make().fingerprint}
    others = {
        make(seed=6).fingerprint,
        make(group=4).fingerprint,
        make(global_batch=16).fingerprint,
        make(kinds(36)).fingerprint,
        make(numbers=np.arange(37) * 2).fingerprint,
    }
    assert len(same) == 1 and len(others) == 5 and not same & others


def test_numbers_are_the_pictures_own():
    chosen = np.array([3, 8, 9, 20])
    ids = make(np.array([1, 1, 0, 0]), numbers=chosen, global_batch=4).epoch_ids(0)
    assert sorted(ids.tolist()) == [3, 8, 9, 20]
    assert {frozenset(p) for p in ids.reshape(-1, 2).tolist()} == {
        frozenset({3, 8}),
        frozenset({9, 20}),
    }


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of data\.group=2"):
        make(global_batch=5)
    with pytest.raises(ConfigError, match="no picture to train on"):
        make(np.zeros(0, bool))
    with pytest.raises(UserError, match="not a multiple of the global batch"):
        make().locate(9)
