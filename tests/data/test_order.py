"""The global order against its definition: every sample once, the same for every world."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from l2vit.data.batch import EvalPlanner, TrainPlanner
from l2vit.data.config import AugmentConfig
from l2vit.data.order import SampleOrder, Share, Split, halve, mix_group, split
from l2vit.data.rng import permutation, philox4x32, uniforms
from l2vit.errors import ConfigError, UserError

SHARDS = [100, 0, 97, 103, 1, 211]


def make(global_batch=16, seed=3, chunk=7, **options):
    return SampleOrder("hash", SHARDS, seed=seed, chunk=chunk, global_batch=global_batch, **options)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # Known answers of Random123 (kat_vectors, philox4x32 10)
        (0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_known_answers(word, expected):
    counter = np.full((1, 4), word, np.uint64)
    found = philox4x32(counter, word << 32 | word)[0]
    assert " ".join(f"{int(x):08x}" for x in found) == expected


def test_uniforms_are_uniform_and_per_stream():
    u = uniforms(9, np.arange(20_000), 5)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 3e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.03
    np.testing.assert_array_equal(uniforms(9, np.array([17, 4]), 3), u[[17, 4], :3])
    assert sorted(permutation(1, 1000)) == list(range(1000))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("global_batch", [1, 16, 64, 512])
def test_every_sample_once_an_epoch(chunk, global_batch):
    order = make(global_batch, chunk=chunk)
    dropped = []
    for epoch in range(4):
        ids = order.epoch_ids(epoch)
        assert len(ids) == len(set(ids.tolist())) == sum(SHARDS) // global_batch * global_batch
        assert ids.min() >= 0 and ids.max() < sum(SHARDS)
        dropped.append(set(range(sum(SHARDS))) - set(ids.tolist()))
    if dropped[0] and len(dropped[0]) < sum(SHARDS) // 2:
        assert any(d != dropped[0] for d in dropped)  # not always the same ones
    assert not np.array_equal(order.epoch_ids(0), order.epoch_ids(1))


def test_the_order_depends_on_hash_and_seed_alone():
    same, other_seed = make().epoch_ids(2), make(seed=4).epoch_ids(2)
    np.testing.assert_array_equal(same, make().epoch_ids(2))
    assert not np.array_equal(same, other_seed)
    other = SampleOrder("other", SHARDS, seed=3, chunk=7, global_batch=16)
    assert not np.array_equal(same, other.epoch_ids(2))


def test_world_micro_batch_accumulation_and_resume_share_one_sequence():
    """The sweep: any split of the step gives the steps of one sequence, over several epochs."""
    order = make(16)
    steps = 3 * order.steps_per_epoch
    reference = np.concatenate([order.epoch_ids(epoch) for epoch in range(3)])
    for world, micro in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 16)):
        if 16 % (world * micro):
            with pytest.raises(ConfigError, match="divide"):
                split(16, world=world, micro_batch=micro)
            continue
        for first_step in (0, 1, order.steps_per_epoch - 1, order.steps_per_epoch, 40):
            found = np.full(len(reference), -1)
            for rank in range(world):
                share = Share(rank, split(16, world=world, micro_batch=micro))
                planner = TrainPlanner(order, share, first_step * 16)
                for number in range((steps - first_step) * share.split.accumulation):
                    plan = planner.plan(number)
                    assert len(plan.ids) == micro
                    at = plan.epoch * order.steps_per_epoch * 16 + plan.positions
                    assert (found[at] == -1).all()
                    found[at] = plan.ids
                    assert number // share.split.accumulation + first_step == at[0] // 16
            np.testing.assert_array_equal(found[first_step * 16 :], reference[first_step * 16 :])


def test_a_rank_reads_in_runs_and_a_batch_mixes_all_chunks():
    order = SampleOrder("h", [1000] * 32, seed=0, chunk=50, global_batch=64)
    ids = order.epoch_ids(0).reshape(-1, 64)
    following = np.diff(ids, axis=0) == 1
    assert following.mean() > 0.95  # a lane goes on with the next sample of its shard
    chunks = np.array([len(set((row // 50).tolist())) for row in ids])
    assert chunks.mean() > 58  # of 64 samples


def test_where_shards_are_cut_changes_with_the_epoch():
    """Else the same samples would begin and end a run, hence be neighbours, in every epoch."""
    order = SampleOrder("h", [1000] * 4, seed=0, chunk=50, global_batch=1)
    starts = []
    for epoch in range(2):
        ids = order.epoch_ids(epoch)
        starts.append(set(ids[1:][np.diff(ids) != 1].tolist()) - {0, 1000, 2000, 3000})
    assert len(starts[0]) > 60 and len(starts[0] & starts[1]) < 30


def test_batches_of_two_epochs_under_way_share_their_plans(monkeypatch):
    order, made = make(16), []
    monkeypatch.setattr(order, "_cut", lambda key, cut=order._cut: made.append(key) or cut(key))
    for epoch in (0, 1, 0, 1, 1, 2, 1, 2):
        np.testing.assert_array_equal(order.epoch_ids(epoch), make(16).epoch_ids(epoch))
    assert len(made) == 3 and len(order._plans) == 2


def test_batch_ids_follow_images_seen():
    order = make(16)
    epoch = order.steps_per_epoch * 16
    np.testing.assert_array_equal(order.batch_ids(epoch + 32), order.epoch_ids(1)[32:48])
    with pytest.raises(UserError, match="not a multiple of the global batch 16"):
        order.batch_ids(24)


def test_a_fingerprint_tells_orders_apart():
    half, other = np.arange(0, 512, 2), np.arange(1, 512, 2)
    orders = [make(), make(8), make(seed=4), make(chunk=3), make(subset=half), make(subset=other)]
    assert len({order.fingerprint for order in orders}) == len(orders)
    assert make(subset=half).fingerprint == make(subset=half.astype(np.int32)).fingerprint
    assert make().fingerprint == make(chunk=4).fingerprint  # 512 samples: both mean 4


def test_too_little_data_is_refused():
    with pytest.raises(ConfigError, match="global_batch: 513 is more than the 512 samples"):
        make(513)


def test_a_subset_is_ordered_alone():
    subset = np.sort(np.random.default_rng(0).choice(512, 200, replace=False))
    order = make(8, subset=subset)
    ids = order.epoch_ids(1)
    assert order.samples == 200 and set(ids.tolist()) == set(subset.tolist())
    assert order.following(int(subset[5])) == subset[6]
    assert order.following(int(subset[-1])) == subset[0]


@pytest.mark.parametrize("world", [1, 2, 7, 70])
def test_evaluation_takes_every_sample_once(world):
    for samples, batch in itertools.product((1, 60, 61), (1, 4, 100)):
        planners = [EvalPlanner(samples, rank, world, batch) for rank in range(world)]
        assert len({len(planner) for planner in planners}) == 1
        plans = [planner.plan(n) for planner in planners for n in range(len(planner))]
        ids = np.concatenate([plan.ids for plan in plans])
        assert sorted(ids.tolist()) == list(range(samples))
        for planner in planners:
            filled = [len(planner.plan(n).ids) > 0 for n in range(len(planner))]
            assert filled == sorted(filled, reverse=True) and sum(filled) == planner.filled


def test_the_plan_of_imagenet22k_is_small():
    """14.2 M samples: the plan holds chunks, not samples."""
    order = SampleOrder("h", [10_000] * 1420, seed=0, chunk=256, global_batch=4096)
    assert order.chunk == 256
    plan = order._plan_of(7)
    assert plan.starts.nbytes + plan.ends.nbytes < 2e6
    assert len(set(order.batch_ids(4096 * 12345).tolist())) == 4096


def test_groups_bind_the_micro_batch_only_where_samples_are_mixed():
    """A share of 3 that ran out of memory used to be given up for a mixing group of 2."""
    mixed, plain = AugmentConfig(), AugmentConfig(mixup=0.0, cutmix=0.0)
    assert (mix_group(mixed), mix_group(plain)) == (2, 1)
    assert mix_group(AugmentConfig(mixup=0.0, mix_group=4)) == 4
    share = split(6, world=2, multiple_of=mix_group(plain))
    assert halve(share, multiple_of=mix_group(plain)) == Split(1, 3, 2)


def test_an_order_is_sent_to_workers_without_its_chunks():
    """40,000 shards of 10,000: the chunks of one epoch would be 25 MB for each worker."""
    order = SampleOrder("h", [10_000] * 40_000, seed=0, chunk=256, global_batch=4096)
    expected = order.batch_ids(4096 * 77)
    sent = pickle.dumps(order)
    assert len(sent) < 1e6
    np.testing.assert_array_equal(pickle.loads(sent).batch_ids(4096 * 77), expected)
