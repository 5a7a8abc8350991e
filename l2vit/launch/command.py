"""The launcher's flags and the program's configuration, checked before anything is started."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from l2vit import cli, config
from l2vit.errors import ConfigError
from l2vit.train import checks, tasks
from l2vit.train.config import TrainConfig

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _parser(program: str) -> argparse.ArgumentParser:
    parser = cli.parser(
        f"bash {program}",
        "Start the ranks on this node (or on a hostfile's nodes) and watch them.",
        epilog="Everything else goes to the program: --config FILE and key.sub=value overrides.\n"
        "Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped by a signal after\n"
        "saving (the same command continues).",
        keys_of=TrainConfig,
    )
    add = parser.add_argument
    nproc = os.environ.get("L2VIT_NPROC") or None
    add("--nproc", default=nproc, help="ranks on each node; default: its GPUs, or 2 on CPU")
    add("--max-restarts", type=int, default=0, help="restarts after a failure (default 0)")
    add("--backoff", type=float, default=10.0, help="seconds before the first restart, doubling")
    add("--stop-grace", type=float, default=300.0, help="seconds to save after a signal")
    add(
        "--give-up-after",
        default="24h",
        metavar="TIME",
        help="how long to go on with starts that cannot reach a node: 90, 30m, 24h (default)",
    )
    add(
        "--start-timeout",
        default="30m",
        metavar="TIME",
        help="a rank that has not begun its first step by then ends (default 30m; 0: never)",
    )
    add("--preflight", action="store_true", help="check the cluster with these ranks; no training")
    _add_several_nodes(parser.add_argument_group("several nodes"))
    return parser


def _add_several_nodes(group: argparse._ArgumentGroup) -> None:
    def add(name: str, text: str) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        group.add_argument(*spellings, dest=name, metavar="X", help=text)

    add("hostfile", "file of 'HOST slots=N' lines; the ranks are started there over ssh")
    add("include", "use only HOST[:SLOT,...], several separated by @")
    add("exclude", "do not use HOST[:SLOT,...], several separated by @")
    add("num_nodes", "use the first so many nodes")
    add("master_addr", "address of the first node, where the ranks meet")
    add("master_port", "port there; default: any free one")
    add("ssh_port", "port of the ssh daemons")
    add("ssh_args", "more arguments for ssh, as one word: --ssh_args='-F my_config'")
    add("node_rank", "with --no_ssh: which of the nodes this one is, from 0")
    add("lease", "a node not heard of for so long is lost (default 60s)")
    group.add_argument(
        "--no_ssh", "--no-ssh", action="store_true", help="each node runs this command itself"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Split ``SCRIPT ARGS`` into the launcher's options and the program's (``.rest``)."""
    script, *arguments = argv
    options, rest = _parser(script).parse_known_args(arguments)
    options.script, options.rest = script, rest
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts: {options.max_restarts} must not be negative")
    for name in ("nproc", "num_nodes", "node_rank", "master_port", "ssh_port"):
        value = getattr(options, name)
        if value is not None:
            least = 0 if name in ("node_rank", "master_port") else 1
            if not value.isdigit() or int(value) < least:
                raise ConfigError(f"--{name}: {value!r} is not a number from {least} on")
            setattr(options, name, int(value))
    options.give_up_after = seconds(options.give_up_after, "--give-up-after")
    options.start_timeout = seconds(options.start_timeout, "--start-timeout")
    options.lease = seconds(options.lease or "60s", "--lease")
    if options.no_ssh and (
        not options.hostfile or options.node_rank is None or not options.master_addr
    ):
        raise ConfigError("--no_ssh needs --hostfile, --node_rank and --master_addr, too")
    return options


def seconds(text: str, flag: str) -> float:
    """A time such as 90, 45s, 30m, 24h or 2d, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise ConfigError(f"{flag}: {text!r} is not a time such as 90, 30m or 24h")
    return float(match[1]) * _UNITS[match[2]]


def read_config(rest: Sequence[str]) -> TrainConfig:
    """The program's configuration, read here so that a wrong one costs no launch.

    Raises:
        ConfigError: no ``--config``, or anything the program itself would refuse.
    """
    return tasks.load_config(*config_arguments(rest))


def config_arguments(rest: Sequence[str]) -> tuple[str, list[str]]:
    """The file and the overrides among the program's arguments.

    Raises:
        ConfigError: no ``--config``.
    """
    path, overrides = None, []
    arguments = iter(rest)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        elif not argument.startswith("-"):
            overrides.append(argument)
    if path is None:
        raise ConfigError("--config FILE is required (pretrain/configs or finetune/configs)")
    return path, overrides


def check(script: str, rest: Sequence[str]) -> None:
    """Refuse a run that cannot work before anything is started for it.

    Raises:
        UserError: of :func:`l2vit.train.checks.check`, with the file or override at fault.
    """
    settings = read_config(rest)
    with _blamed(rest):
        if Path(script).stem == "finetune":
            checks.require_first_weights(settings)
        checks.check(settings)


def check_ranks(rest: Sequence[str], ranks: int) -> None:
    """Refuse a global batch that this many ranks cannot share.

    Raises:
        ConfigError: with the file or override at fault.
    """
    settings = read_config(rest)
    with _blamed(rest):
        checks.check_ranks(settings, ranks)


@contextlib.contextmanager
def _blamed(rest: Sequence[str]) -> Iterator[None]:
    """Add the file or override at fault to a ConfigError that knows its key."""
    try:
        yield
    except ConfigError as error:
        raise config.blamed(error, *config_arguments(rest)) if error.key else error from None
