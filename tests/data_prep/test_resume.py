"""Killed, out of space, without its source: nothing finished is lost, and the end is the same."""

import gc
import multiprocessing
import os
import resource
import signal
from multiprocessing.connection import Connection

import pytest
from raw_archives import outer_tar, small_release, write_release
from shard_contents import samples, tree

import data_prep.build
import data_prep.gather
import data_prep.records
import data_prep.scan
import data_prep.shards
from data_prep.__main__ import main
from data_prep.pool import parallel_map
from l2vit.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("raw") / "whole.tar", small_release(8, 25))


def words(source, out, workers=2):
    return [
        *("build", "--dataset", "imagenet22k", "--source", str(source), "--out", str(out)),
        *("--split", "both", "--val-per-class", "5", "--shard-samples", "10"),
        *("--workers", str(workers)),
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, source):
    out = tmp_path_factory.mktemp("reference") / "out"
    assert main(words(source, out, 1)) == 0
    return tree(out)


def child(target, *arguments):
    """A forked process, so that nothing of it survives in this one."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def killed_at_event(number, arguments):
    """Build; SIGKILL this whole process at its ``number``-th image or file, if it comes so far."""
    events = multiprocessing.get_context("fork").Value("i", 0)
    victim = os.getpid()

    def counted(function):
        def call(*given, **named):
            with events.get_lock():
                events.value += 1
                if events.value == number:
                    os.kill(victim, signal.SIGKILL)
            return function(*given, **named)

        return call

    data_prep.scan.clean = counted(data_prep.scan.clean)
    os.replace = counted(os.replace)
    os._exit(main(arguments))


@pytest.mark.parametrize("extra", [[], ["--gather"]])
def test_killed_at_any_moment(extra, tmp_path, source, reference, monkeypatch):
    """SIGKILL at ever later images and files; each next run continues; the bytes are the same."""
    monkeypatch.setattr(data_prep.gather, "_TASK_BYTES", 1)
    # Workers of a killed build hold its lock until they are gone, however busy the machine is.
    monkeypatch.setattr(data_prep.build, "_LOCK_PATIENCE", 300.0)
    out = tmp_path / "out"
    statuses = []
    while not statuses or statuses[-1] == -signal.SIGKILL:
        process = child(killed_at_event, 1 + 3 * len(statuses), [*words(source, out), *extra])
        process.join()
        statuses.append(process.exitcode)
        for shard in out.glob("*/shard-*.tar"):
            assert shard.stat().st_size > 0
    assert statuses[-1] == 0 and len(statuses) > 5
    assert tree(out) == reference


def test_finished_work_is_not_done_again(tmp_path, source, reference, monkeypatch):
    out = tmp_path / "out"
    done = []
    writer = data_prep.shards.write_records

    def failing(writing, records, tar, copy):
        if len(done) == 7:
            raise OSError("pulled the plug")
        done.append(tar)
        return writer(writing, records, tar, copy)

    monkeypatch.setattr(data_prep.shards, "write_records", failing)
    with pytest.raises(OSError, match="plug"):
        main(words(source, out, 1))
    monkeypatch.setattr(data_prep.shards, "write_records", writer)
    before = {path: path.stat().st_mtime_ns for path in done}

    def forbidden(*_):
        raise AssertionError("an image was checked a second time")

    monkeypatch.setattr(data_prep.scan, "clean", forbidden)
    assert main(words(source, out, 1)) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert tree(out) == reference
    monkeypatch.setattr(data_prep.shards, "write_records", forbidden)
    assert main(words(source, out, 1)) == 0  # complete: nothing at all is done


def test_what_a_kill_after_the_last_manifest_left_is_removed(
    tmp_path, source, reference, monkeypatch
):
    out = tmp_path / "out"

    def killed(_):
        raise OSError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(data_prep.records.Workspace, "tidy", killed)
        with pytest.raises(OSError, match="plug"):
            main(words(source, out, 1))
    needless = {"parts", "spool", "staged", "gathered", "done", "records.bin", "fate.npy"}
    assert {path.name for path in (out / ".build").iterdir()} >= needless
    assert main(words(source, out, 1)) == 0
    left = {path.name for path in (out / ".build").iterdir()}
    assert left.isdisjoint(
        {"parts", "spool", "staged", "gathered", "done", "records.bin", "fate.npy"}
    )
    assert tree(out) == reference


def test_a_full_disk_is_a_clear_error_and_no_loss(tmp_path, source, reference, capfd):
    out = tmp_path / "out"

    def cramped(limit):
        # the file size limit stands in for a full disk: the write call fails the same way
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(main(words(source, out)))

    for limit in (3000, 40_000):
        process = child(cramped, limit)
        process.join()
        assert process.exitcode == 1
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "cannot write" in error and str(out) in error
        assert not list(out.rglob("*.tmp"))
    assert main(words(source, out)) == 0
    assert tree(out) == reference


def test_a_vanished_source_is_named_and_its_return_continues(
    tmp_path, source, reference, monkeypatch, capsys
):
    raw = tmp_path / "moved.tar"
    raw.write_bytes(source.read_bytes())
    out = tmp_path / "out"
    real = data_prep.shards.write_records

    def vanish(writing, records, tar, copy):
        if raw.exists() and len(list(out.rglob("shard-*.tar"))) == 3:
            raw.rename(tmp_path / "away.tar")
        return real(writing, records, tar, copy)

    monkeypatch.setattr(data_prep.shards, "write_records", vanish)
    assert main(words(raw, out, 1)) == 1
    error = capsys.readouterr().err
    assert str(raw) in error and "No such file" in error
    finished = sorted(out.rglob("shard-*.tar"))
    assert len(finished) == 3
    (tmp_path / "away.tar").rename(raw)
    monkeypatch.setattr(data_prep.shards, "write_records", real)
    stamps = [path.stat().st_mtime_ns for path in finished]
    assert main(words(raw, out, 1)) == 0
    assert stamps == [path.stat().st_mtime_ns for path in finished]
    shards = {name: sha for name, sha in tree(out).items() if "shard-" in name}
    assert shards == {name: sha for name, sha in reference.items() if "shard-" in name}


def test_a_source_that_changed_under_the_build_is_noticed(tmp_path, source, monkeypatch, capsys):
    raw = tmp_path / "raw.tar"
    raw.write_bytes(source.read_bytes())
    real = data_prep.shards.write_records

    def scribble(writing, records, tar, copy):
        data = bytearray(raw.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
        raw.write_bytes(data)
        return real(writing, records, tar, copy)

    monkeypatch.setattr(data_prep.shards, "write_records", scribble)
    assert main(words(raw, tmp_path / "out", 1)) == 1
    assert f"{raw} changed since it was checked" in capsys.readouterr().err


def test_other_options_do_not_continue_a_build(tmp_path, source, run, capsys):
    base = words(source, tmp_path / "out", 1)
    assert run(*base) == 0
    assert run(*base, "--seed", 5) == 1
    assert "seed" in capsys.readouterr().err
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "shard-000000.tar").write_bytes(b"somebody else's")
    plain = ("build", "--dataset", "imagenet22k", "--source", source, "--out", stray)
    assert run(*plain, "--workers", 1) == 1
    assert (stray / "shard-000000.tar").read_bytes() == b"somebody else's"


def test_two_builds_do_not_meet(tmp_path, source, capsys, monkeypatch):
    import fcntl

    monkeypatch.setattr(data_prep.build, "_LOCK_PATIENCE", 0.1)
    (tmp_path / "out/.build").mkdir(parents=True)
    with (tmp_path / "out/.build/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(words(source, tmp_path / "out", 1)) == 1
    assert "another build" in capsys.readouterr().err


def test_a_killed_worker_is_a_clear_error(tmp_path, source, reference, monkeypatch, capsys):
    real = data_prep.scan.clean
    seen = iter(range(1_000))  # each forked worker counts its own copy

    def deadly(data, rules):
        if multiprocessing.parent_process() is not None and next(seen) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, rules)

    monkeypatch.setattr(data_prep.scan, "clean", deadly)
    assert main(words(source, tmp_path / "out")) == 1
    assert "worker was killed" in capsys.readouterr().err
    monkeypatch.setattr(data_prep.scan, "clean", real)
    assert main(words(source, tmp_path / "out")) == 0
    assert tree(tmp_path / "out") == reference


def torn_at_three(_, task):
    """Let this worker be killed with half of its answer on the way."""

    def torn(pipe, data):
        os.write(pipe.fileno(), data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if task == 3:
        Connection._send = torn
    return task


def test_a_worker_killed_while_it_answers_is_a_clear_error():
    with pytest.raises(UserError, match="worker was killed"):
        list(parallel_map(torn_at_three, None, range(8), 2))
    assert not multiprocessing.active_children()


def failing_at_three(_, task):
    if task == 3:
        raise ZeroDivisionError("in a worker")
    return 10 * task


def test_work_is_done_once_and_an_error_ends_it():
    assert dict(parallel_map(torn_at_three, None, [0, 1, 2], 5)) == {0: 0, 1: 1, 2: 2}
    done = []
    with pytest.raises(ZeroDivisionError, match="in a worker") as raised:
        done.extend(parallel_map(failing_at_three, None, range(50), 3))
    assert "failing_at_three" in raised.value.__notes__[0], "where it happened"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("kind", ["outer", "class", "gzip", "text", "missing"])
def test_damaged_sources_are_named(kind, tmp_path, run, capsys):
    import gzip

    whole = outer_tar(small_release(2, 4))
    path = tmp_path / ("n90000000.tar" if kind == "class" else "raw.tar")
    if kind == "outer":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "class":
        inner = whole[512 : len(whole) // 2]
        path.write_bytes(inner[: len(inner) // 2])
    elif kind == "gzip":
        packed = gzip.compress(whole)
        path.write_bytes(packed[: len(packed) // 2])
    elif kind == "text":
        path.write_text("no tar at all")
    out = tmp_path / "out"
    plain = ("build", "--dataset", "imagenet22k", "--source", path, "--out", out, "--workers", 1)
    assert run(*plain) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    assert not (out / "manifest.json").exists()


def test_one_bad_class_archive_does_not_stop_the_others(tmp_path, run):
    from raw_archives import class_members, jpeg, tar_bytes
    from shard_contents import lines

    good = tar_bytes(class_members("n94000000", [jpeg(1), jpeg(2)]))
    bad = tar_bytes(class_members("n94000001", [jpeg(3), jpeg(4)]))[:2000]
    path = tmp_path / "raw.tar"
    path.write_bytes(tar_bytes([("n94000000.tar", good), ("n94000001.tar", bad)]))
    out = tmp_path / "out"
    plain = ("build", "--dataset", "imagenet22k", "--source", path, "--out", out, "--workers", 1)
    assert run(*plain) == 0
    assert len(samples(out)) == 2
    events = lines(out / "rejected.jsonl")
    assert "damaged-archive" in {event["reason"] for event in events}


def test_a_spoilt_copy_falls_back_on_the_source(tmp_path, source, reference, monkeypatch):
    """Copies are not synced, so a power cut may leave holes in them."""
    out = tmp_path / "out"
    real = data_prep.shards.write_records
    used = []

    def spoil(writing, records, tar, copy):
        used.append(copy)
        data = copy.read_bytes()
        copy.write_bytes(bytes(len(data) // 3) + data[len(data) // 3 : -500])
        return real(writing, records, tar, copy)

    monkeypatch.setattr(data_prep.shards, "write_records", spoil)
    assert main([*words(source, out, 1), "--gather"]) == 0
    assert len(used) == 20 and tree(out) == reference


class OfTheParent:
    """Garbage that must not be collected in another process, as a DALI pipeline: it hangs there."""

    def __init__(self):
        self.pid, self.itself = os.getpid(), self

    def __del__(self):
        if os.getpid() != self.pid:
            os._exit(1)


def collect(context, task):
    gc.collect()
    return task


def test_workers_leave_the_garbage_of_their_parent_alone():
    gc.disable()
    try:
        OfTheParent()
        assert sorted(parallel_map(collect, None, [1, 2, 3], 2)) == [(1, 1), (2, 2), (3, 3)]
    finally:
        gc.enable()
