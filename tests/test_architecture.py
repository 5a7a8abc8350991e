"""The house, checked: who may import whom, and how large things may grow."""

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("data_prep", "pretrain", "finetune", "launch")
SOURCES = [p for folder in (*PROGRAMS, "l2vit") for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth, with `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = list(path.relative_to(ROOT).parts[: -node.level])
                base = ".".join([*package, base]).strip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    assert not (tops(path) & set(PROGRAMS) - {room}), "a program imports a sibling, or l2vit one"


def test_models_need_only_torch_and_timm():
    allowed = {"torch", "timm", "l2vit", "triton"} | set(sys.stdlib_module_names)
    for path in (ROOT / "l2vit" / "models").rglob("*.py"):
        assert tops(path) <= allowed, name(path)
        ours = {i for i in imports(path) if i.startswith("l2vit.")}
        assert all(i.startswith(("l2vit.models", "l2vit.errors")) for i in ours), name(path)


@pytest.mark.parametrize(
    ("library", "owner"),
    [("deepspeed", "l2vit/train/engine.py"), ("nvidia", "l2vit/data/dali_loader.py")],
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
