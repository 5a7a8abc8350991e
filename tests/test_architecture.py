"""The house, checked: who may import whom, and how large things may grow."""

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("data_prep", "pretrain", "finetune", "launch")
SOURCES = [p for folder in (*PROGRAMS, "l2vit") for p in sorted((ROOT / folder).rglob("*.py"))]

# Imports point from a higher room to a lower one, or stay inside a room.
LEVELS = {
    **dict.fromkeys(PROGRAMS, 5),
    "l2vit.__main__": 5,  # the console script
    "l2vit.launch": 4,
    "l2vit.plan": 3,
    "l2vit.train": 2,
    "l2vit.dense": 1,
    "l2vit": 1,  # its __init__, which registers the models
    "l2vit.data": 0,
    "l2vit.models": 0,
}
SHARED = ("config", "files", "errors", "cli", "charts", "pages")
"""Modules of l2vit that every room may use; they use only each other."""

# Documented commands that moved: each is a file of one import, kept for those who type the old.
FORWARDS = {("l2vit/data/preview.py", "pretrain/preview.py")}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth, with `from a import b` as both a and a.b."""
    return {item for statement in statements(path) for item in statement}


def imported_files(path: Path) -> set[str]:
    """The files of this project that a file imports; a package counts as its ``__init__``."""
    found = set()
    for statement in statements(path):
        base, *members = map(_file, statement)
        found |= {member or base for member in members} or {base}
    return found - {"", name(path)}


def statements(path: Path) -> list[list[str]]:
    """For each import: the module, then, for `from a import b`, each a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = list(path.relative_to(ROOT).parts[: -node.level])
                base = ".".join([*package, base]).strip(".")
            found.append([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [[module] for module in _modules(node.args[0])]
    return found


def _modules(argument: ast.expr) -> list[str]:
    """What ``import_module(argument)`` may import: all of a package for f"package.{name}"."""
    if isinstance(argument, ast.Constant):
        return [argument.value]
    if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
        package = argument.values[0].value.rpartition(".")[0].replace(".", "/")
        return [f"{package}/{p.stem}".replace("/", ".") for p in (ROOT / package).glob("*.py")]
    return []


def _file(module: str) -> str:
    """The project's file that holds a module; empty if it is not ours."""
    path = ROOT / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate in _SOURCE_SET:
            return name(candidate)
    return ""


_SOURCE_SET = set(SOURCES)
GRAPH = {name(path): imported_files(path) for path in SOURCES}


def room(file: str) -> str:
    """``finetune``, ``l2vit.train``, ...; ``shared`` for what every room may use."""
    top, *below = Path(file).with_suffix("").parts
    if top != "l2vit":
        return top
    if below == ["__init__"]:
        return "l2vit"
    return "shared" if below[0] in SHARED else f"l2vit.{below[0]}"


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def points_down(file: str, target: str) -> bool:
    here, there = room(file), room(target)
    if here == there or there == "shared":
        return True
    return here != "shared" and LEVELS[there] < LEVELS[here]


@pytest.mark.parametrize(
    ("file", "target", "allowed"),
    [
        ("pretrain/train.py", "l2vit/launch/rank.py", True),
        ("l2vit/train/trainer.py", "l2vit/cli.py", True),
        ("l2vit/data/loader.py", "l2vit/train/trainer.py", False),
        ("l2vit/data/loader.py", "l2vit/models/l2vit.py", False),
        ("l2vit/cli.py", "l2vit/train/trainer.py", False),
        ("pretrain/train.py", "finetune/train.py", False),
        ("l2vit/train/trainer.py", "pretrain/train.py", False),
    ],
)
def test_what_pointing_down_means(file, target, allowed):
    assert points_down(file, target) is allowed


def test_imports_point_down():
    upward = {(f, t) for f, targets in GRAPH.items() for t in targets if not points_down(f, t)}
    assert upward == FORWARDS


def test_forwards_are_one_import():
    for file, _ in FORWARDS:
        body = [n for n in ast.parse((ROOT / file).read_text()).body if not _is_text(n)]
        assert len(body) <= 4, f"{file} does more than hand over"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_no_import_circles():
    assert _circles() == set()


def _circles() -> set[frozenset[str]]:
    """Sets of files that all import each other, directly or through others."""
    reached = {file: _reachable(file) for file in GRAPH}
    return {
        frozenset(other for other in reached[file] if file in reached[other])
        for file in GRAPH
        if file in reached[file]
    }


def _reachable(file: str) -> set[str]:
    found: set[str] = set()
    waiting = [file]
    while waiting:
        for target in GRAPH[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def test_every_room_is_known():
    assert {room(file) for file in GRAPH} <= {*LEVELS, "shared"}


def test_models_need_only_torch_and_timm():
    # timm cannot be installed without safetensors.
    allowed = {"torch", "timm", "safetensors", "l2vit", "triton"} | set(sys.stdlib_module_names)
    for path in (ROOT / "l2vit" / "models").rglob("*.py"):
        assert tops(path) <= allowed, name(path)
        ours = {i for i in imports(path) if i.startswith("l2vit.")}
        assert all(i.startswith(("l2vit.models", "l2vit.errors")) for i in ours), name(path)


LOW_LEVEL = ("mkldnn", "autograd.Function", "is_compiling", "is_tracing", "is_exporting")


def test_only_ops_and_export_know_how_a_model_is_run():
    folder = ROOT / "l2vit" / "models"
    free = [folder / "ops", folder / "export.py"]
    found = {
        name(path)
        for path in folder.rglob("*.py")
        if not any(path.is_relative_to(place) for place in free)
        and any(word in path.read_text() for word in LOW_LEVEL)
    }
    assert found == set()


@pytest.mark.parametrize(
    ("library", "owner"),
    [
        ("deepspeed", "l2vit/train/engine.py"),
        ("nvidia", "l2vit/data/dali.py"),
        ("pycocotools", "l2vit/dense/coco.py"),
        ("segmentation_models_pytorch", "l2vit/dense/segmentor.py"),
    ],
)
def test_one_file_alone_imports(library, owner):
    assert [name(p) for p in SOURCES if library in tops(p)] == [owner]


def functions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]
    return [(f"{name(path)}:{n.name}", n.end_lineno - n.lineno + 1) for n in nodes]


def test_sizes_stay_readable():
    extra = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lines = {name(p): p.read_text().count("\n") for p in [*SOURCES, *extra]}
    assert {n: count for n, count in lines.items() if count > 500} == {}
    sizes = [item for path in SOURCES for item in functions(path)]
    assert [item for item in sizes if item[1] > 80] == []
    assert statistics.median(count for _, count in sizes) <= 15


def test_public_arguments_are_annotated():
    bare = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare += [
                    f"{name(path)}:{node.lineno} {node.name}({a.arg})"
                    for a in arguments
                    if a.annotation is None and a.arg not in ("self", "cls")
                ]
    assert bare == []


def test_nothing_unpickles_untrusted_files():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"{name(path)}:{node.lineno}"
