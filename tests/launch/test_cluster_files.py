"""Slurm scripts, Kubernetes manifest, host file, run_all.sh: parsed or run with pretended tools."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from l2vit import config
from l2vit.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.s[hb]*")), ids=lambda p: p.name)
def test_bash_can_read_it(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_both_launchers_are_the_same_but_for_the_program():
    pretrain, finetune = ((LAUNCH / f"{p}.sh").read_text() for p in ("pretrain", "finetune"))
    assert pretrain.replace("Pretrain", "Fine-tune").replace("pretrain", "finetune") == finetune
    first, second = (
        (LAUNCH / "slurm" / f"{p}.sbatch").read_text() for p in ("pretrain", "finetune")
    )
    first = first.replace("pretrain", "finetune").replace("in22k_base", "in22k_in1k_base_384")
    assert first == second


def test_hostfile_is_one_deepspeed_reads():
    hosts = {}
    for line in (LAUNCH / "hostfile.example").read_text().splitlines():
        if line and not line.startswith("#"):
            host, slots = re.fullmatch(r"(\S+)\s+slots=(\d+)", line).groups()
            hosts[host] = int(slots)
    assert hosts == {"node-0": 8, "node-1": 8}


def test_environment_file_sets_only_what_it_says(tmp_path):
    script = f"env -i bash -c 'set -a; . {LAUNCH / 'environment.sh'}; env'"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    names = {line.split("=")[0] for line in found.stdout.splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def command_runs(container: dict, processes: int) -> None:
    """What the container is told is a command of ours with a configuration that loads."""
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == str(processes)
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    script, flag, path, *overrides = container["args"]
    assert container["command"] == ["torchrun"] and flag == "--config"
    assert (ROOT / script).is_file()
    settings = config.load(TrainConfig, ROOT / path, overrides)
    assert settings.run.dir.startswith("/runs/") and settings.data.train.startswith("/data/")


def mounts_what_it_names(pod: dict) -> None:
    (container,) = pod["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_pytorchjob(monkeypatch):
    """Kubeflow's own model of the job keeps all that the manifest says."""
    import kubernetes.client
    from kubeflow.training import models

    (job,) = manifests("pretrain.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for replica in spec["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        mounts_what_it_names(pod)
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        command_runs(container, spec["nprocPerNode"])
    for name in (name for name in dir(models) if name.startswith("KubeflowOrg")):
        monkeypatch.setattr(
            kubernetes.client.models, name, getattr(models, name), raising=False
        )  # where the client looks for the classes of the fields
    client = kubernetes.client.ApiClient()
    answer = types.SimpleNamespace(data=json.dumps(job))
    read = client.deserialize(answer, models.KubeflowOrgV1PyTorchJob)
    assert client.sanitize_for_serialization(read) == job


def test_trainjob():
    """The same under Kubeflow Trainer 2, whose models refuse wrong types."""
    from kubeflow_trainer_api import models

    runtime, job = manifests("trainjob.yaml")
    read = models.TrainerV1alpha1TrainingRuntime.from_dict(runtime)
    assert read.to_dict() == runtime
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {
        "name": runtime["metadata"]["name"],
        "kind": runtime["kind"],
    }
    (node,) = read.spec.template.spec.replicated_jobs
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert node.name == "node" and node.template.metadata.labels == labels
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    mounts_what_it_names(pod["spec"])
    trainer = job["spec"]["trainer"]
    command_runs(trainer | {"resources": trainer["resourcesPerNode"]}, trainer["numProcPerNode"])
    before = manifests("pretrain.yaml")[0]["spec"]["pytorchReplicaSpecs"]["Master"]
    assert trainer["args"] == before["template"]["spec"]["containers"][0]["args"]


SRUN = """#!/bin/bash
echo "$@" >> "$CALLS"
trap 'exit 75' USR1
[ "$SRUN_STATUS" = late ] && { trap '' USR1; kill -USR1 $PPID; exit 0; }
[ -n "$SRUN_STATUS" ] && exit "$SRUN_STATUS"
kill -USR1 $PPID
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo node7; echo node8;;
"show node") echo "   NodeAddr=10.0.0.7 NodeHostName=node7";;
"--oneliner show") echo "JobId=4711 JobState=$STATE";;
*) echo "scontrol $@" >> "$CALLS";;
esac
"""
SLURM_CASES = [
    ("0", "RUNNING", 0, True),  # status 0 without DONE is a failure
    ("1", "RUNNING", 1, True),
    ("2", "RUNNING", 2, False),
    ("1", "CANCELLED", 1, False),
    ("", "RUNNING", 75, True),
    ("late", "RUNNING", 0, True),  # the warning comes as the ranks end: theirs is the status
    ("", "COMPLETING", 75, False),
]


@pytest.mark.parametrize(("ends", "state", "status", "requeued"), SLURM_CASES)
def test_slurm_job_queues_again_what_another_start_may_help(
    tmp_path, ends, state, status, requeued
):
    """Slurm's tools pretended; without a status the warning comes while the ranks run."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls, config_file = tmp_path / "calls", tmp_path / "a b.yaml"
    config_file.write_text(
        f"run: {{dir: '{tmp_path}/run'}}\nmodel: {{name: l2vit_mini}}\n"
        "schedule: {global_batch: 8}\n"
    )
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SRUN_STATUS": ends,
        "STATE": state,
        "VIRTUAL_ENV": sys.prefix,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    script = LAUNCH / "slurm" / "pretrain.sbatch"
    done = subprocess.run(
        ["bash", str(script), "--config", str(config_file), "about.paper=a  b"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    told = calls.read_text()
    assert f"bash launch/pretrain.sh --config {config_file} about.paper=a  b" in told
    assert ("scontrol requeue 4711" in told) is requeued, done.stdout + done.stderr


def test_slurm_headers():
    text = (LAUNCH / "slurm" / "pretrain.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.M))
    assert options["signal"].startswith("B:USR1@") and "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]


PRETENDED = """#!/bin/bash
echo "$@" >> "$CALLS"
printf '<%s>' "$@" >> "$CALLS.words"
case "$*" in *$FAIL_AT*) exit 75;; esac
"""


def test_run_all_continues_at_the_stage_that_stopped(tmp_path):
    """Every program pretended; each stage is entered once unless it failed."""
    (tmp_path / "launch").mkdir()
    for name in ("run_all.sh", "common.sh"):
        (tmp_path / "launch" / name).write_text((LAUNCH / name).read_text())
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    programs = [tmp_path / "venv" / "bin" / "python"]
    programs += [tmp_path / "launch" / f"{p}.sh" for p in ("pretrain", "finetune")]
    for program in programs:
        program.write_text(PRETENDED)
        program.chmod(0o755)
    calls, out = tmp_path / "calls", tmp_path / "out"
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "venv"), "CALLS": str(calls)}
    environment |= {"OVERRIDES": "ema.decay=0.9\nabout.expected=two words"}
    environment |= {"IN22K": "/a/in22k.tar", "IN1K": "/a/in1k", "OUT": str(out)}

    def run(fail_at: str) -> tuple[int, list[str]]:
        calls.write_text("")
        command = ["bash", str(tmp_path / "launch" / "run_all.sh"), "--max-restarts", "3"]
        command += ["--", "schedule.length=30 epochs", "about.paper=a;b *"]
        done = subprocess.run(
            command, env=environment | {"FAIL_AT": fail_at}, capture_output=True, text=True
        )
        return done.returncode, calls.read_text().splitlines()

    status, told = run("in22k_base.yaml")
    assert status == 75 and len(told) == 4
    assert "--max-restarts 3 --config pretrain/configs/in22k_base.yaml" in told[-1]
    words = (tmp_path / "calls.words").read_text()
    given = "<schedule.length=30 epochs><about.paper=a;b *><ema.decay=0.9>"
    assert words.endswith(given + "<about.expected=two words>")
    status, told = run("in22k_in1k_base_384")
    assert status == 75
    assert [line.split("--config ")[1].split()[0] for line in told] == [
        "pretrain/configs/in22k_base.yaml",
        "finetune/configs/in22k_in1k_base_224.yaml",
        "finetune/configs/in22k_in1k_base_384.yaml",
    ]
    assert all(f"init.source={out}/pretrain" in line for line in told[1:])
    status, told = run("nothing at all")
    assert status == 0 and len(told) == 1 + 4
    status, told = run("nothing at all")
    assert (status, told) == (0, [])
    del environment["IN22K"]
    (out / "finished" / "shards22k").unlink()
    assert run("nothing at all")[0] == 2
