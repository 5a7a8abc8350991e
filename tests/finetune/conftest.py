"""A small trained model, its run and its export, made once."""

import pytest
from digit_models import NAMES, WNIDS, digit_jpegs, make_model, write_checkpoint, write_shards

import l2vit  # noqa: F401
from l2vit.train import checkpoint


@pytest.fixture(scope="session")
def digits():
    return digit_jpegs(120)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, digits):
    path = tmp_path_factory.mktemp("data") / "val"
    write_shards(path, digits, WNIDS, NAMES)
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory, digits):
    """The same pictures as a folder per class."""
    root = tmp_path_factory.mktemp("folders")
    for number, (data, digit) in enumerate(digits):
        (root / WNIDS[digit]).mkdir(exist_ok=True)
        (root / WNIDS[digit] / f"s{number:05d}.jpg").write_bytes(data)
    return root


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def run(tmp_path_factory, model, shards):
    """A run directory with one complete checkpoint, and a torn newer one."""
    path = tmp_path_factory.mktemp("runs") / "run"
    write_checkpoint(path, model, val=shards)
    checkpoint.step_directory(path, 8).mkdir()
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory, run):
    from finetune import export_timm

    out = tmp_path_factory.mktemp("exports") / "digits_model"
    assert export_timm.main(["--checkpoint", str(run), "--out", str(out)]) == 0
    return out
