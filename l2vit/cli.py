"""The command line of every program: one parser, one wrapper, one way to print.

A program is a function ``main(argv) -> status`` under :func:`program`, which turns errors into one
line and an exit status: 0 success, 2 wrong arguments or configuration, 1 any other failure. What it
needs beyond its parser it imports after parsing, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from l2vit.errors import ConfigError, UserError

Main = Callable[[Sequence[str]], int | None]
INTERRUPTED = 130
EXTRAS = {
    **dict.fromkeys(("deepspeed", "nvidia", "tensorboard", "sklearn"), "train"),
    **dict.fromkeys(("simplejpeg", "scipy", "rich", "matplotlib", "fsspec", "aiohttp"), "train"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("wandb", "mlflow", "trackio"), "loggers"),
    **dict.fromkeys(("segmentation_models_pytorch", "pycocotools"), "dense"),
}
"""Packages that only some programs need, and the extra of pyproject.toml that brings each."""


# -- parsing


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and options written out in full."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parser(
    prog: str, description: str = "", *, epilog: str = "", keys_of: type | None = None
) -> Parser:
    """An empty parser for one program.

    Args:
        prog: what people type, such as ``python -m pretrain plan``.
        description: the first lines of ``--help``; line breaks are kept.
        epilog: the last lines of ``--help``.
        keys_of: the configuration the program reads: ``--help KEY`` and ``--keys`` explain it.
    """
    made = Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=keys_of is None,
    )
    if keys_of is not None:
        about: dict[str, Any] = {"action": _Explain, "dest": "explain", "schema": keys_of}
        made.add_argument(
            *("-h", "--help"), **about, nargs="?", metavar="KEY", help="this, or a key or section"
        )
        made.add_argument("--keys", **about, nargs=0, help="every key of the configuration")
    return made


class _Explain(argparse.Action):
    """Print the help of a program, of one key or section, or of all keys; then exit."""

    def __init__(self, *args: Any, schema: type, **options: Any) -> None:
        super().__init__(*args, **{**options, "default": argparse.SUPPRESS})
        self._schema = schema

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: Any, value: Any, option: Any = None
    ) -> None:
        from l2vit.config import reference

        if option == "--keys":
            print("\n".join(map(str, reference.keys(self._schema))))
        elif value:
            print("\n".join(map(str, reference.find(self._schema, value))))
        else:
            parser.print_help()
        parser.exit()


def add_config(to: argparse.ArgumentParser) -> None:
    """Add ``--config FILE`` and ``key.sub=value`` overrides, wherever these stand."""
    to.add_argument(
        "--config", required=True, metavar="FILE", help="YAML of pretrain/configs, finetune/configs"
    )
    to.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="changes to the configuration, anywhere after the command",
    )


def parse(with_parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options in ``argv`` (None: of this process); overrides may stand between them."""
    return with_parser.parse_intermixed_args(argv)


# -- running


def program(name: str, *, rank_0_reports: bool = False) -> Callable[[Main], Callable[..., int]]:
    """Decorate ``main(argv)`` so that it returns an exit status whatever happens.

    Args:
        name: what errors are printed under.
        rank_0_reports: every rank runs the program and meets the same errors: one prints them.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def with_status(argv: Sequence[str] | None = None) -> int:
            arguments = sys.argv[1:] if argv is None else argv
            report = not rank_0_reports or is_rank_0()
            return run(lambda: main(arguments), program=name, report=report)

        return with_status

    return decorate


def run(main: Callable[[], int | None], *, program: str, report: bool = True) -> int:
    """Call ``main`` and turn its outcome into an exit status.

    0 on success (or the status ``main`` returns), 2 for a configuration error, 1 for any other
    error a user can mend, a package that is not installed among them. Unexpected exceptions keep
    their traceback: they are ours to fix.

    Args:
        main: the program's body.
        program: the name errors are printed under, such as ``data_prep build``.
        report: print the error; ranks other than 0 pass False for errors all ranks share.
    """
    try:
        return main() or 0
    except UserError as error:
        if report:
            line = " ".join(str(error).split())
            tell(f"{program}: error: {line}", error=True)
        return error.exit_status
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        if report:
            tell(
                f"{program}: error: {package} is missing: pip install 'l2vit[{extra}]'", error=True
            )
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        mute(sys.stdout)
        return 1
    finally:
        flush()


def commands(prog: str, table: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> int:
    """Run the subcommand ``argv`` begins with.

    Args:
        prog: what people type before the subcommand, such as ``python -m pretrain``.
        table: the module with a ``main(argv)`` and one line of help, by subcommand.
        argv: the subcommand and its arguments.
    """
    width = max(map(len, table)) + 2
    lines = [f"usage: {prog} COMMAND ...", ""]
    lines += [f"  {name:<{width}}{text}" for name, (_, text) in table.items()]
    usage = "\n".join([*lines, "", f"{prog} COMMAND --help lists a command's options."])
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name not in table:
        known = ", ".join(table)
        raise ConfigError(f"{name!r} is no command; known: {known}" if name else f"give {known}")
    status: int = importlib.import_module(table[name][0]).main(argv[1:])
    return status


def is_rank_0() -> bool:
    """True in the first process of a job, and in a program started alone."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


# -- printing


def tell(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print at once; what cannot be written (terminal closed, disk full) is dropped.

    For processes that must go on, or end in their own way, whatever became of their output.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as problem:
        if problem.errno != errno.ENOSPC:  # room may be made; no reader comes back
            mute(stream)


def mute(stream: TextIO) -> None:
    """Send what is printed to ``stream``, and what was not flushed yet, to /dev/null."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush() -> None:
    """Flush, so that the interpreter's own try at its end cannot change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            mute(stream)
