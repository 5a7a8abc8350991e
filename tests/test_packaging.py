"""What is installed: the wheel's content, its extras, and ``l2vit`` as one command."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml

import l2vit
from l2vit import __main__ as program
from l2vit import cli

ROOT = Path(__file__).parents[1]
PACKAGES = ("l2vit", "data_prep", "pretrain", "finetune")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(file):
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-")}


def name(requirement):
    return re.split(r"[<>=\[; ]", requirement)[0]


def test_extras_are_the_requirements():
    extras = {key: set(value) for key, value in PROJECT["optional-dependencies"].items()}
    needed = {r for r in requirements("requirements.txt") if name(r) != "timm"}
    assert extras["train"] | extras["dense"] == needed
    assert extras["export"] | extras["loggers"] < requirements("requirements-dev.txt")
    lowest = {r.partition(",")[0] for r in requirements("requirements.txt")}
    assert set(PROJECT["dependencies"]) < lowest
    assert {name(r) for r in PROJECT["dependencies"]} == {"torch", "timm"}


def test_the_lock_is_the_exact_set_with_hashes():
    """Of what requirements.txt needs; pip installs nothing that has no hash then."""
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    pinned = (line.split("==") for line in requirements("constraints.txt"))
    exact = {canonical(package): version for package, version in pinned}
    both = set(locked) & set(exact)
    assert {p: locked[p] for p in both} == {p: exact[p] for p in both}
    assert set(locked) - both == {"setuptools", "wheel"}  # asked for by torch and astunparse
    assert {canonical(name(r)) for r in requirements("requirements.txt")} <= set(locked)
    for entry in re.split(r"\n(?=\S)", text.partition("\n\n")[2].strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}(?!\w)", entry), entry
    assert "://" not in text and "index-url" not in text and "find-links" not in text


def canonical(package):
    """As PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a folder behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_programs_recipes_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "*.css", "*.js")
        for path in (ROOT / package).rglob(pattern)
    }
    content = {n for n in names if ".dist-info/" not in n}
    assert content == source | {"l2vit/py.typed"}


def test_its_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (folder,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}

    class FromWheel(Distribution):
        def read_text(self, filename):
            return archive.read(f"{folder}/{filename}").decode()

        def locate_file(self, path):
            raise NotImplementedError

    found = FromWheel()
    assert found.version == l2vit.__version__
    (script,) = found.entry_points
    assert (script.name, script.value) == ("l2vit", "l2vit.__main__:main")
    assert set(found.metadata.get_all("Provides-Extra")) == {"train", "export", "dense", "loggers"}


# -- the command


@pytest.mark.parametrize(
    "command", [c for c in program.COMMANDS if c not in ("timm", "completion")]
)
def test_commands_are_the_programs(command, capsys):
    """``l2vit X --help`` is what the program itself prints."""
    groups = ("data", "pretrain", "finetune")
    if command in groups[1:]:
        assert program.main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            program.main([command, "--help"])
        assert ended.value.code == 0
    module = program.COMMANDS[command][0].removesuffix(".__main__").replace(".", " ")
    assert module.split()[0] in capsys.readouterr().out.splitlines()[0]


def test_wrong_commands(capsys):
    assert program.main(["pretrian"]) == 2
    assert "'pretrian' is no command; known: data, pretrain" in capsys.readouterr().err
    assert program.main(["keys", "--nonsense"]) == 2


def test_a_script_of_timm_knows_our_models(tmp_path, capsys, monkeypatch):
    (tmp_path / "neighbour.py").write_text("WORD = 'hello'\n")
    (tmp_path / "list.py").write_text(
        "import sys, timm, neighbour\n"
        "print(neighbour.WORD, sys.argv[1:], 'l2vit_tiny' in timm.list_models())\n"
    )
    monkeypatch.setenv("TIMM_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["l2vit"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert program.main(["timm", "list.py", "--model", "x"]) == 0
    assert capsys.readouterr().out == "hello ['--model', 'x'] True\n"
    assert program.main(["timm", "validate.py"]) == 2
    assert "set TIMM_ROOT" in capsys.readouterr().err


def test_completion_in_bash(tmp_path):
    """Bash itself completes, with the script that the command prints."""
    (tmp_path / "l2vit.bash").write_text(program.completion())
    (tmp_path / "run.yaml").touch()
    cases = {
        ("l2vit", "pre"): "pretrain preview",
        ("l2vit", "pretrain", "pl"): "plan",
        ("l2vit", "pretrain", "train", "--config", "r"): "run.yaml",
        ("l2vit", "plan", "optim.be"): "optim.betas=",
        ("l2vit", "keys", "optim.be"): "optim.betas",
    }
    for words, expected in cases.items():
        script = f"""compopt() {{ :; }}; . ./l2vit.bash
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _l2vit
        echo "${{COMPREPLY[*]}}" """
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_a_missing_package_is_one_line(capsys):
    @cli.program("some program")
    def main(argv):
        raise ModuleNotFoundError("no", name=argv[0])

    assert main(["deepspeed.ops"]) == 1
    said = capsys.readouterr().err
    assert said == "some program: error: deepspeed is missing: pip install 'l2vit[train]'\n"
    with pytest.raises(ModuleNotFoundError):
        main(["l2vit.nothing"])


def test_missing_packages_have_an_extra_that_brings_them():
    imports = {"segmentation_models_pytorch": "segmentation-models-pytorch"}
    imports |= {"mlflow": "mlflow-skinny"}
    imports |= {"nvidia": "nvidia-dali-cuda130", "sklearn": "scikit-learn"}
    for package, extra in cli.EXTRAS.items():
        brought = {name(r) for r in PROJECT["optional-dependencies"][extra]}
        assert imports.get(package, package) in brought


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["version"] == l2vit.__version__
    assert found["preferred-citation"]["title"] in (ROOT / "README.md").read_text()


def test_containers_keep_the_images_own_torch(tmp_path):
    """The line that both definitions run, on the requirements as they are."""
    for file in ("Dockerfile", "l2vit.def"):
        text = (ROOT / "launch" / "container" / file).read_text()
        assert "NOT BUILT YET" in text
        (command,) = re.findall(r"grep -vE .*? requirements\.txt", text)
        kept = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        names = {name(line) for line in kept.splitlines() if line and line[0] != "#"}
        dropped = {name(r) for r in requirements("requirements.txt")} - names
        assert dropped == {"torch", "torchvision", "nvidia-dali-cuda130"}
