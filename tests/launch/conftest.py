"""A project whose training program only pretends, so that launching alone is tested."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from l2vit.data.manifest import Manifest, Shard

ROOT = Path(__file__).parents[2]

# Behaves as the variable STUB says. Leaves what it saw in ranks/N.json in the run directory.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from l2vit import config
from l2vit.train.config import TrainConfig

def main(argv):
    settings = config.load(TrainConfig, argv[1], argv[2:])
    run, rank = Path(settings.run.dir), os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    (run / "ranks").mkdir(parents=True, exist_ok=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    seen = {"pid": os.getpid(), "argv": list(argv), "environment": dict(os.environ)}
    temporary = run / "ranks" / f"{rank}.tmp"
    temporary.write_text(json.dumps(seen))
    temporary.rename(run / "ranks" / f"{rank}.json")
    if os.environ["STUB"] == "done":
        if rank == "0":
            (run / "DONE").write_text('{"length": ["90 epochs", "0 epochs"]}')
        return 0
    if os.environ["STUB"] == "wait":
        while not stopped:
            time.sleep(0.05)
        (run / "ranks" / f"{rank}.stopped").touch()
        return 75
    return int(os.environ["STUB"])
"""

CONFIG = """
run: {dir: RUN}
model: {name: l2vit_mini}
schedule: {global_batch: 32}
data: {train: ROOT/shards}
"""


class Project:
    def __init__(self, root: Path):
        self.root, self.run = root, root / "run"
        shutil.copytree(ROOT / "launch", root / "launch")
        (root / "l2vit").symlink_to(ROOT / "l2vit")
        for program in ("pretrain", "finetune"):
            (root / program).mkdir()
            (root / program / "__init__.py").touch()
            (root / program / "train.py").write_text(PROGRAM)
        shard = Shard("shard-000000.tar", samples=64, bytes=0, sha256="", index_sha256="")
        (root / "shards").mkdir()
        for name in (shard.name, shard.index_name):
            (root / "shards" / name).touch()
        manifest = Manifest("two classes", "train", ("a", "b"), (shard,), (32, 32))
        manifest.save(root / "shards")
        self.config = root / "config.yaml"
        self.config.write_text(CONFIG.replace("RUN", str(self.run)).replace("ROOT", str(root)))

    def environment(self, stub: str, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "L2VIT_"))}
        ours = {"STUB": stub, "VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
        return kept | ours | {"PYTHONPATH": str(self.root)} | more


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)
