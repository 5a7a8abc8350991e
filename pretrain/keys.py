"""``python -m pretrain keys``: what the keys of a configuration mean; docs/configuration.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from l2vit import cli, config
from l2vit.config import reference
from l2vit.train import tasks
from l2vit.train.config import TrainConfig

_ROOT = Path(__file__).parents[1]
_HEAD = """# Every key of a configuration

<!-- Written by `python -m pretrain keys --markdown`; a test holds it current. -->

A recipe is a YAML file of these keys, in `pretrain/configs/` or `finetune/configs/`.
`base: other.yaml` starts from another file. Each key can be given on the command line as
`key.sub=value`; `key=` means no text. An unknown key, a wrong type or a value out of range is
refused before anything starts, in one line that names the key and the file or override.
`bash launch/pretrain.sh --help optim.lr` explains one key there, `--keys` all of them.

"Set by" names the recipes that give a key a value of their own.

"""


@cli.program("pretrain keys")
def main(argv: Sequence[str]) -> None:
    """Print the keys the command line asks for."""
    parser = cli.parser("python -m pretrain keys", "What the keys of a configuration mean.")
    parser.add_argument("key", nargs="?", default="", help="a key or section; default: all")
    parser.add_argument("--names", action="store_true", help="names only, one a line")
    parser.add_argument("--markdown", action="store_true", help="write docs/configuration.md")
    options = cli.parse(parser, argv)
    if options.markdown:
        print(page(), end="")
        return
    find = reference.find(TrainConfig, options.key) if options.key else reference.keys(TrainConfig)
    print("\n".join(key.name if options.names else str(key) for key in find))


def page() -> str:
    """docs/configuration.md."""
    parts = [_HEAD + reference.markdown(TrainConfig, recipes_by_key(tasks.DEFAULT))]
    for task in tasks.names():
        if task != tasks.DEFAULT:
            settings = tasks.kind(task).settings()
            tables = reference.markdown(settings, recipes_by_key(task), without=TrainConfig)
            head = f"# With `task: {task}`\n\nThese sections replace those above or are new.\n"
            parts.append(f"{head}\n{tables}")
    return "\n".join(parts)


def recipes_by_key(task: str) -> Mapping[str, Sequence[str]]:
    """Which recipes of a task set each key themselves, in alphabetical order."""
    found: dict[str, list[str]] = {}
    for folder in ("pretrain", "finetune"):
        for path in sorted((_ROOT / folder / "configs").glob("*.yaml")):
            if config.read_tree(path).get("task", tasks.DEFAULT) != task:
                continue
            for key in _dotted(yaml.safe_load(path.read_text()) or {}):
                found.setdefault(key, []).append(path.stem)
    return found


def _dotted(tree: Mapping[str, object], where: str = "") -> list[str]:
    names = []
    for key, value in tree.items():
        name = f"{where}{key}"
        names.append(name)
        if isinstance(value, Mapping):
            names += _dotted(value, f"{name}.")
    return names


if __name__ == "__main__":
    sys.exit(main())
