"""Files from elsewhere: timm's own models and checkpoints, and files that are no weights."""

import argparse
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch

from l2vit.errors import UserError
from l2vit.train.config import InitConfig
from l2vit.train.transfer import load_initial
from l2vit.train.weights import read_pretrained


def network(name, classes=1000, **others):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=classes, **others).eval()


def answers(model, size=64):
    torch.manual_seed(2)
    with torch.inference_mode():
        return model(torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_safetensors_of_a_timm_model_begin_a_fine_tuning(tmp_path, name):
    """As timm's hub files are: tensors under timm's names; the file's own name says nothing."""
    model, file = network(name), tmp_path / "pytorch_model.bin"
    safetensors.torch.save_file(model.state_dict(), file)
    target = network(name, 3)
    init = InitConfig(source=str(file))
    load_initial(target, init, classes=("n01440764", "b", "c"), class_names=())
    head = target.pretrained_cfg["classifier"]
    for key, tensor in target.state_dict().items():
        if not key.startswith(f"{head}."):
            assert torch.equal(tensor, model.state_dict()[key])
    # n01440764, the tench, is the first of ImageNet-1k's classes.
    assert torch.equal(target.get_classifier().weight[0], model.get_classifier().weight[0])


def timm_checkpoint(path, model, averaged, **settings):
    """What timm's CheckpointSaver writes: train.py's names of fields, typed here."""
    wrapped = {f"_orig_mod.module.{key}": value for key, value in model.state_dict().items()}
    content = {
        "epoch": 3,
        "arch": model.pretrained_cfg["architecture"],
        "state_dict": wrapped,
        "optimizer": {"state": {}, "param_groups": []},
        "version": 2,
        "args": argparse.Namespace(lr=0.1, model="any", **settings),
        "state_dict_ema": averaged.state_dict(),
        "metric": 71.2,
    }
    torch.save(content, path)
    return path


def test_a_checkpoint_of_timms_train_py_says_what_it_is(tmp_path):
    model = network("l2vit_mini", 1000, img_size=64, window_size=2)
    averaged = network("l2vit_mini", 1000, img_size=64, window_size=2)
    with torch.no_grad():
        averaged.get_classifier().bias += 1
    settings = {"img_size": 64, "model_kwargs": {"window_size": 2}}
    file = timm_checkpoint(tmp_path / "model_best.pth.tar", model, averaged, **settings)
    for choice, expected in (("raw", model), ("ema", averaged), ("auto", averaged)):
        source = read_pretrained(file, weights=choice)
        assert (source.model, source.preprocessing.input_size) == ("l2vit_mini", 64)
        assert torch.equal(answers(source.build()), answers(expected))
    with pytest.raises(UserError, match="holds l2vit_mini, not resnet18"):
        read_pretrained(file, model="resnet18")


def test_a_checkpoint_of_another_timm_model(tmp_path):
    model = network("vit_tiny_patch16_224", 7, img_size=64)
    file = timm_checkpoint(
        tmp_path / "last.pth.tar", model, model, img_size=None, input_size=[3, 64, 64]
    )
    source = read_pretrained(file)
    assert torch.equal(answers(source.build()), answers(model))
    assert "does not name its 7 classes" in source.note


@pytest.mark.parametrize("name", ["l2vit_mini", "flatten_swin_mini", "inline_deit_tiny"])
def test_our_own_names_of_tensors_are_recognised(tmp_path, name):
    model, file = network(name), tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    source = read_pretrained(file, model=name)
    for key, tensor in model.state_dict().items():
        assert torch.equal(source.weights[key], tensor)
    if name == "l2vit_mini":
        assert read_pretrained(file).model == name
    pickled = tmp_path / "weights.pth"
    torch.save(model.state_dict(), pickled)
    assert read_pretrained(pickled, model=name).weights.keys() == source.weights.keys()


def test_safetensors_beside_a_timm_configuration_use_it(exported):
    assert (
        read_pretrained(exported / "model.safetensors").classes == read_pretrained(exported).classes
    )


class Evil:
    def __reduce__(self):
        return (os.system, ("touch run_by_the_unpickler",))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4242\n"
OTHERS = {
    "junk": (os.urandom(400).replace(b"{", b"_"), "begins with"),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "is a web page"),
    "pointer": (POINTER.encode(), "is a git-lfs pointer"),
    "error": (
        b'{"error": "Repository not found"}',
        'is text, not weights: \'{"error": "Repository',
    ),
    "empty": (b"", "is empty"),
    "archive": (b"\x1f\x8b\x08" + bytes(60), "archive: unpack it"),
    "torn": (
        safetensors.torch.save({"a": torch.ones(900)})[:-500],
        "is a damaged safetensors file",
    ),
    "torn zip": (b"PK\x03\x04" + bytes(600), "cannot be read as a checkpoint"),
    "a dict": (pickle.dumps({"x": 1.0}), "cannot be read as a checkpoint"),
    "malicious": (pickle.dumps(Evil()), "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_of_weights_is_named(tmp_path, kind):
    content, expected = OTHERS[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pretrained(file, model="resnet18")
    message = str(caught.value)
    assert str(file) in message and expected in message
    assert "\n" not in message and "weights_only" not in message and len(message) < 300


def test_a_malicious_pickle_is_named_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.pth"
    torch.save({"state_dict": Evil()}, file)
    with pytest.raises(UserError, match=r"asks for (posix|os)\.system, which weights do not need"):
        read_pretrained(file, model="resnet18")
    assert not (tmp_path / "run_by_the_unpickler").exists()
