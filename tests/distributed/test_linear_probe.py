"""optim.train=head: the classifier learns, every other number stays as it was."""

import pytest
import timm
import torch
import torch.nn.functional as F
from forked_ranks import Ranks
from small_runs import settings, train

from l2vit.errors import ConfigError
from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader
from l2vit.train.probe import fix_body


def network(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, drop_path_rate=0.3)


@pytest.mark.parametrize("name", ["resnet18", "l2vit_mini"])
def test_training_sees_what_evaluation_sees(name):
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    with torch.inference_mode():
        expected = network(name).eval()(images)
    probe = network(name).train()
    fix_body(probe)
    before = {key: value.clone() for key, value in probe.named_buffers()}
    logits = probe.train()(images)
    torch.testing.assert_close(logits.detach(), expected)
    F.cross_entropy(logits, labels).backward()
    learning = {key for key, value in probe.named_parameters() if value.grad is not None}
    head = probe.pretrained_cfg["classifier"]
    assert learning == {f"{head}.weight", f"{head}.bias"}
    # The gradient of a linear layer under softmax and cross-entropy, written out.
    features = probe.eval().forward_head(probe.forward_features(images), pre_logits=True)
    error = torch.softmax(expected, 1) - F.one_hot(labels, 4)
    torch.testing.assert_close(probe.get_classifier().weight.grad, error.T @ features / 2)
    assert all(torch.equal(value, before[key]) for key, value in probe.named_buffers())


def test_a_network_that_does_not_tell_its_classifier_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.train=head: Linear does not tell"):
        fix_body(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(1, "fp32", marks=pytest.mark.ci),
        pytest.param(2, "bf16", marks=pytest.mark.ci),
        (3, "bf16"),
    ],
)
def test_only_the_classifier_changes(shards, tmp_path, stage, precision):
    runs = {}
    for steps in (1, 4):
        runs[steps] = tmp_path / f"run{steps}"
        path = settings(
            shards,
            runs[steps],
            model__name="test_resnet",
            data__input_size=32,
            optim__train="head",
            schedule__length=f"{steps} steps",
            schedule__warmup="0 steps",
            schedule__global_batch=8,
            engine__zero_stage=stage,
            engine__precision=precision,
            ema__decay=0.0,
            checkpoint__every="100 steps",
        )
        ranks = Ranks(train, 2 if stage == 3 else 1, path, directory=tmp_path, raw=True)
        assert set(ranks.wait()) == {0}, ranks.log(0)[-3000:]
    first, last = (Reader(checkpoint.find(runs[steps])).weights("raw") for steps in (1, 4))
    assert first.keys() == timm.create_model("test_resnet").state_dict().keys()
    changed = {key for key in first if not torch.equal(first[key], last[key])}
    assert changed == {"fc.weight", "fc.bias"}
