"""The copies of checkpoints: complete ones only, as many as are kept, and failures told."""

import pytest

from l2vit.errors import ConfigError, UserError
from l2vit.train import checkpoint
from l2vit.train.mirror import Mirror


def make(run, step):
    directory = checkpoint.step_directory(run, step)
    directory.mkdir(parents=True)
    (directory / "part-00000-of-00001.safetensors").write_bytes(bytes([step]) * 50)
    (directory / checkpoint.META_NAME).write_text(f'{{"step": {step}}}')
    return directory


def test_what_is_copied_comes_back(tmp_path):
    mirror = Mirror(f"file://{tmp_path}/copies", keep_last=2, keep_every=10)
    for step in (10, 11, 12, 13):
        mirror.copy(make(tmp_path / "run", step))
        mirror.finish()
    assert sorted(p.name[-2:] for p in (tmp_path / "copies").iterdir()) == ["10", "12", "13"]
    (tmp_path / "copies" / "step-00000013" / checkpoint.META_NAME).unlink()
    assert mirror.fetch_newest(tmp_path / "new") == 12
    assert checkpoint.complete_steps(tmp_path / "new") == [12]
    for path in checkpoint.step_directory(tmp_path / "run", 12).iterdir():
        copied = checkpoint.step_directory(tmp_path / "new", 12) / path.name
        assert copied.read_bytes() == path.read_bytes()
    assert Mirror(f"file://{tmp_path}/nothing").fetch_newest(tmp_path / "other") is None


def test_failures_are_told_and_do_not_stop_a_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    mirror = Mirror(f"file://{tmp_path}/file/copies")
    mirror.copy(make(tmp_path / "run", 1))
    mirror.finish()
    assert "warning: step-00000001 was not copied to file://" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: cannot open nowhere://x"):
        Mirror("nowhere://x")


def test_a_copy_that_cannot_be_read_stops_the_start(tmp_path, monkeypatch):
    mirror = Mirror(f"file://{tmp_path}/copies")
    mirror.copy(make(tmp_path / "run", 1))
    mirror.finish()

    def refuse(*arguments):
        raise OSError("connection reset")

    monkeypatch.setattr(type(mirror._files), "get_file", refuse)
    with pytest.raises(UserError, match=r"cannot read file://.*connection reset"):
        mirror.fetch_newest(tmp_path / "new")
    assert checkpoint.complete_steps(tmp_path / "new") == []
