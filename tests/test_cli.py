"""Every program's command line: --help at once, wrong arguments as one line and status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from finetune.__main__ import COMMANDS as FINETUNE
from finetune.__main__ import main as finetune
from l2vit import cli
from l2vit.errors import UserError
from pretrain.__main__ import COMMANDS as PRETRAIN
from pretrain.__main__ import main as pretrain

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    *[(data_prep, command) for command in ("build", "verify", "report", "digits")],
    *[(pretrain, command) for command in PRETRAIN],
    *[(finetune, command) for command in FINETUNE],
]


def name(value):
    return value if isinstance(value, str) else value.__module__.partition(".")[0]


@pytest.mark.parametrize(("program", "command"), PROGRAMS, ids=name)
def test_help_of_every_command(program, command, capsys):
    with pytest.raises(SystemExit) as ended:
        program([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert command in said.out.splitlines()[0] and said.err == ""


@pytest.mark.parametrize(("program", "command"), PROGRAMS, ids=name)
def test_a_wrong_argument_is_one_line(program, command, capsys):
    assert program([command, "--no-such-option"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert ": error: " in said.err and f"{command} --help" in said.err


@pytest.mark.parametrize("program", [pretrain, finetune], ids=name)
def test_commands_are_listed_and_unknown_ones_named(program, capsys):
    table = PRETRAIN if program is pretrain else FINETUNE
    assert program(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {command} " in listed for command in table)
    assert program(["tran"]) == 2
    assert "'tran' is no command; known: train, " in capsys.readouterr().err
    assert program([]) == 2


LIGHT = {
    "data_prep": ["-m", "data_prep", "--help"],
    "data_prep build": ["-m", "data_prep", "build", "--help"],
    "pretrain": ["-m", "pretrain", "--help"],
    "pretrain train": ["-m", "pretrain", "train", "--help"],
    "pretrain plan": ["-m", "pretrain", "plan", "--help"],
    "pretrain preview": ["-m", "pretrain", "preview", "--help"],
    "finetune": ["-m", "finetune", "--help"],
    "finetune evaluate": ["-m", "finetune.evaluate", "--help"],
    "finetune export": ["-m", "finetune", "export", "--help"],
    "finetune look": ["-m", "finetune", "look", "--help"],
    "finetune train": ["-m", "finetune", "train", "--help"],
    "finetune detect": ["-m", "finetune", "detect", "--help"],
    "finetune segment": ["-m", "finetune.segment", "--help"],
    "launch": ["-m", "l2vit.launch", "launch/pretrain.sh", "--help"],
}


@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT)
def test_help_loads_no_torch(arguments):
    """Importing torch and timm takes seconds; -X importtime lists what was imported."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "timm", "torchvision", "matplotlib", "deepspeed"}


# -- the wrapper


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(None, 0), (0, 0), (75, 75), (UserError("disk\nfull"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_programs_end_is_its_status(outcome, status, capsys):
    @cli.program("some program")
    def main(argv):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert main([]) == status
    expected = "some program: error: disk full\n" if status == 1 else ""
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_one_rank_reports_what_all_meet(variable, monkeypatch, capsys):
    @cli.program("rank", rank_0_reports=True)
    def main(argv):
        raise UserError("the same on all")

    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv(variable, rank)
        assert main([]) == 1
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_overrides_may_stand_anywhere():
    parser = cli.parser("test")
    cli.add_config(parser)
    parser.add_argument("--gpus", type=int)
    options = cli.parse(parser, ["a.b=1", "--config", "f.yaml", "c=2", "--gpus", "4", "d.e=x y"])
    assert options.overrides == ["a.b=1", "c=2", "d.e=x y"]
    assert (options.config, options.gpus) == ("f.yaml", 4)
