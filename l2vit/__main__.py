"""``l2vit COMMAND``: every program under one name; the same as the ``python -m`` programs."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli
from l2vit.errors import ConfigError

COMMANDS = {
    "data": ("data_prep.__main__", "raw archives to shards: build, verify, report"),
    "pretrain": ("pretrain.__main__", "train, plan, preview, runs, report, keys"),
    "finetune": ("finetune.__main__", "train, evaluate, export, look"),
    "plan": ("pretrain.plan", "steps, learning rates, memory, time and cost of a run"),
    "preview": ("pretrain.preview", "a page with the pictures and targets of a batch"),
    "runs": ("pretrain.runs", "how far the runs in a directory have come, and their curves"),
    "report": ("pretrain.report", "the page about one run, at any time"),
    "keys": ("pretrain.keys", "what the keys of a configuration mean"),
    "evaluate": ("finetune.evaluate", "exact accuracy on shards or folders of pictures"),
    "export": ("finetune.export_timm", "a directory timm loads, proven to be the same model"),
    "publish": ("finetune.publish", "an exported directory to a repository of Hugging Face's hub"),
    "look": ("finetune.look", "Grad-CAM, attention maps and clamped denominators as pictures"),
    "timm": ("l2vit.__main__", "one of timm's scripts, with our models registered"),
    "completion": ("l2vit.__main__", "bash completion: source <(l2vit completion)"),
}


@cli.program("l2vit", rank_0_reports=True)
def main(argv: Sequence[str]) -> int:
    """Run the command the command line names."""
    if argv and argv[0] == "timm":
        return run_timm_script(argv[1:])
    if argv and argv[0] == "completion":
        print(completion(), end="")
        return 0
    return cli.commands("l2vit", COMMANDS, argv)


def run_timm_script(argv: Sequence[str]) -> int:
    """Run a script of timm (``validate.py ARGS``) as if timm had our models.

    The scripts are in none of timm's packages: ``TIMM_ROOT`` names a checkout that has them.

    Raises:
        ConfigError: no such script.
    """
    if not argv:
        raise ConfigError("timm: give a script, such as validate.py, and its arguments")
    places = [Path(argv[0]), Path(os.environ.get("TIMM_ROOT", ".")) / argv[0]]
    script = next((place for place in places if place.is_file()), None)
    if script is None:
        raise ConfigError(f"timm: no script {argv[0]}; set TIMM_ROOT to a checkout of timm")
    sys.argv = [str(script), *argv[1:]]
    sys.path.insert(0, str(script.parent))  # scripts import their neighbours
    runpy.run_path(str(script), run_name="__main__")
    return 0


_COMPLETION = """_l2vit() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words
  compopt +o nospace
  case $before in
    l2vit) words="{commands}" ;;
    data) words="build verify report" ;;
    pretrain) words="train plan preview runs report keys" ;;
    finetune) words="train evaluate export publish look detect segment" ;;
    --config) COMPREPLY=($(compgen -f -X '!*.yaml' -- "$word") $(compgen -d -- "$word")); return ;;
    keys|--help) words="{keys}" ;;
    *) words="--config --help --keys {overrides}"; compopt -o nospace ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _l2vit l2vit
"""


def completion() -> str:
    """A bash script that completes commands, configuration files and keys."""
    from l2vit.config import reference
    from l2vit.train.config import TrainConfig

    names = [key.name for key in reference.keys(TrainConfig)]
    overrides = " ".join(f"{name}=" for name in names)
    return _COMPLETION.format(
        commands=" ".join(COMMANDS), keys=" ".join(names), overrides=overrides
    )


if __name__ == "__main__":
    sys.exit(main())
