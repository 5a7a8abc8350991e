"""Every way of starting the ranks, with real launchers and a program that only pretends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from l2vit.launch import processes

DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@contextlib.contextmanager
def started(project, command: list[str], stub: str, **environment: str):
    """Run a command in the project's folder, in its own session; end what is left of it."""
    process = subprocess.Popen(
        command,
        cwd=project.root,
        env=project.environment(stub, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        processes.end_session(process.pid, grace=1.0)
        process.wait()
        process.stdout.close()


def bash(project, program: str = "pretrain", *flags: str) -> list[str]:
    command = ["bash", f"launch/{program}.sh", *flags, "--config", str(project.config)]
    return [*command, "run.seed=3", *(["init.source=scratch"] if program == "finetune" else [])]


def seen(project, rank: int) -> dict:
    return json.loads((project.run / "ranks" / f"{rank}.json").read_text())


def wait_for(project, process, names: tuple[str, ...] = ("0.json", "1.json")) -> None:
    while not all((project.run / "ranks" / name).exists() for name in names):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


def gone(pid: int) -> bool:
    while processes.find(pid) is not None:
        time.sleep(0.1)
    return True


def test_bash_starts_ranks_and_hands_a_signal_to_each(project):
    with started(project, bash(project), "wait", OMP_NUM_THREADS="1") as launcher:
        wait_for(project, launcher)
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate()
    assert launcher.returncode == 75, output
    for rank in (0, 1):
        rank_saw = seen(project, rank)
        assert rank_saw["argv"] == ["--config", str(project.config), "run.seed=3"]
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        expected |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        assert {key: rank_saw["environment"][key] for key in expected} == expected
        assert (project.run / "ranks" / f"{rank}.stopped").exists()
        assert gone(rank_saw["pid"])


@pytest.mark.ci
def test_a_killed_rank_ends_the_others(project):
    with started(project, [*bash(project, "finetune"), "init.source=scratch"], "wait") as launcher:
        wait_for(project, launcher)
        os.kill(seen(project, 1)["pid"], signal.SIGKILL)
        output, _ = launcher.communicate()
    assert launcher.returncode == 1, output
    assert "rank 1 was killed by SIGKILL: " in output and "memory" in output
    assert gone(seen(project, 0)["pid"])


def test_ranks_without_their_supervisor_stop(project):
    with started(project, bash(project), "wait") as launcher:
        wait_for(project, launcher)
        launcher.kill()
        assert gone(seen(project, 0)["pid"]) and gone(seen(project, 1)["pid"])
    assert (project.run / "ranks" / "0.stopped").exists()


def test_one_node_needs_no_deepspeed_launcher(project):
    """The ranks are the supervisor's own children, and what they end with is what it says."""
    with started(project, bash(project), "2") as launcher:
        output, _ = launcher.communicate()
    assert launcher.returncode == 2, output
    assert output == "", "nothing follows the line of the rank that refuses"
    assert "CROSS_RANK" not in seen(project, 0)["environment"], "a variable of DeepSpeed's"
    assert seen(project, 0)["environment"]["MASTER_ADDR"] == "127.0.0.1"


def test_arguments_arrive_as_they_were_given(project):
    """Every character of a shell's, an empty value and a line break."""
    nasty = "about.paper=a b;touch$IFS'x' \"y\" [*?] `id` $HOME \\ | & < > ( ) { } ! # ~ %\né"
    command = [*bash(project), nasty, "about.command="]
    with started(project, command, "done") as launcher:
        output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    assert seen(project, 1)["argv"][-2:] == [nasty, "about.command="]


def test_deepspeed_itself_and_its_orphans_stop(project):
    """SIGTERM to ``deepspeed`` kills only it; the ranks notice and stop as if signalled."""
    command = [*DEEPSPEED, "--num_gpus", "2", "--master_port", "0", "launch/pretrain.sh"]
    command += ["--config", str(project.config), "run.seed=3"]
    with started(project, command, "wait") as launcher:
        wait_for(project, launcher)
        launcher.send_signal(signal.SIGTERM)
        assert gone(seen(project, 0)["pid"]) and gone(seen(project, 1)["pid"])
    assert (project.run / "ranks" / "0.stopped").exists()
    assert seen(project, 0)["argv"] == ["--config", str(project.config), "run.seed=3"]


def test_torchrun(project):
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "launch/pretrain.sh"]
    with started(project, [*command, "--config", str(project.config)], "done") as launcher:
        output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    assert {seen(project, rank)["environment"]["RANK"] for rank in (0, 1)} == {"0", "1"}


def test_srun_tasks_become_ranks(project):
    """As srun starts them: one bash a task, told apart by SLURM_PROCID alone."""
    with contextlib.ExitStack() as stack:
        tasks = [
            stack.enter_context(
                started(
                    project,
                    bash(project),
                    "done",
                    SLURM_STEP_NUM_TASKS="2",
                    SLURM_PROCID=str(rank),
                    SLURM_LOCALID=str(rank),
                )
            )
            for rank in (0, 1)
        ]
        outputs = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert (project.run / "ranks" / "1.json").exists()
    assert (project.run / "DONE").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "configuration file not found: nowhere.yaml"),
        (["--config", "config.yaml", "run.sed=1"], "unknown key run.sed; did you mean run.seed?"),
        (["run.seed=1"], "--config FILE is required"),
        (
            ["--config", "config.yaml", "data.train="],
            "data.train=: data.train is required",
        ),
        (
            ["--config", "config.yaml", "data.train=nowhere"],
            "override data.train=nowhere: data.train: no manifest.json in nowhere",
        ),
        (
            ["--config", "config.yaml", "schedule.global_batch=65"],
            "schedule.global_batch=65: schedule.global_batch: 65 is more than the 64 images",
        ),
        (
            ["--config", "config.yaml", "data.subset.fraction=0.2"],
            "config.yaml: schedule.global_batch: 32 is more than the",
        ),
        (
            ["--config", "config.yaml", "schedule.length=2 epochs"],
            "schedule.warmup: 5 epochs (10 steps) is longer than schedule.length: 2 epochs",
        ),
        (
            ["--config", "config.yaml", "data.val=s3://bucket/val"],
            "data.cache_dir is required to read data.val from s3://bucket/val",
        ),
        (["--config", "config.yaml", "data.val=nowhere"], "override data.val=nowhere: data.val: "),
        (
            ["--config", "config.yaml", "init.source=nowhere"],
            "override init.source=nowhere: init.source: no such file or directory: nowhere",
        ),
        (["--config", "config.yaml", "run.resume=nowhere"], "run.resume: no such run"),
        (
            ["--config", "config.yaml", "model.name=l2vit_tinny"],
            "model.name: timm knows no 'l2vit_tinny'; similar: l2vit",
        ),
        (
            ["--config", "config.yaml", "model.args={depth: 3}"],
            "override model.args={depth: 3}: model.args: l2vit_mini: ",
        ),
        (["--nproc", "none", "--config", "config.yaml"], "--nproc: 'none' is not a number"),
        (["--no_ssh", "--config", "config.yaml"], "--no_ssh needs --hostfile"),
        (["--give-up-after", "soon", "--config", "config.yaml"], "'soon' is not a time such as 90"),
        (["--hostfile", "nowhere", "--config", "config.yaml"], "--hostfile: cannot read nowhere"),
    ],
)
def test_a_wrong_configuration_costs_no_launch(project, arguments, message, monkeypatch, capsys):
    from l2vit.launch import __main__ as program
    from l2vit.launch import supervisor

    monkeypatch.chdir(project.root)
    monkeypatch.setattr(supervisor.Supervisor, "run", lambda *_: pytest.fail("launched"))
    assert program.main(["launch/pretrain.sh", *arguments]) == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1 and message in output.err
    assert output.out == ""
