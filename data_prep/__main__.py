"""``python -m data_prep``: raw image archives to clean, shuffled, indexed WebDataset shards."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli
from l2vit.errors import ConfigError


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512M or 1G") from None


def _add_build(commands: argparse._SubParsersAction) -> None:
    build = commands.add_parser(
        "build", help="sources to shards; the same command again continues a killed one"
    )
    build.set_defaults(run=run_build)
    add = build.add_argument
    add("--dataset", required=True, choices=["imagenet22k", "imagenet1k", "folder"])
    add("--source", required=True, nargs="+", metavar="PATH", help="archives or directories")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--seed", type=int, default=0, help="of the shuffle and of the split")
    split = build.add_argument_group("which part")
    add = split.add_argument
    add(
        "--split",
        choices=["train", "val", "both"],
        default="",
        help="default: all, as train; of a folder, its parts or train and a tenth as val",
    )
    add("--val-fraction", type=float, default=0.0, metavar="F", help="by a hash of each key")
    add("--val-per-class", type=int, default=0, metavar="N", help="lowest hashes of each class")
    add("--val-first-per-class", type=int, default=0, metavar="N", help="in archive order")
    add("--val-labels", default="", metavar="FILE", help="ImageNet-1k ground truth, if no devkit")
    add(
        "--classes",
        default="auto",
        help="what labels refer to: auto (by the set of classes found), found, a layout such as"
        " imagenet22k, imagenet12k, imagenet21k-p-fall11, a shard directory, or a file",
    )
    add("--min-class-images", type=int, default=0, metavar="N", help="drop smaller classes")
    guard = build.add_argument_group("leakage guard")
    add = guard.add_argument
    add(
        "--exclude",
        nargs="+",
        default=(),
        metavar="PATH",
        help="images to keep out: shards, a directory or tar of images, or a list of SHA-256 or"
        " keys",
    )
    add(
        "--exclude-distance",
        type=int,
        default=0,
        metavar="BITS",
        help="also near copies, by Hamming distance of a 64-bit perceptual hash (0 ... 6; try 3)",
    )
    clean = build.add_argument_group("cleaning")
    add = clean.add_argument
    add("--min-side", type=int, default=32, metavar="PX", help="leave out smaller images")
    add("--max-short-side", type=int, default=0, metavar="PX", help="reduce larger ones")
    add("--max-pixels", type=int, default=100_000_000, help="leave out larger images")
    add("--max-bytes", type=_size, default=64 << 20, help="leave out larger members")
    add("--format", choices=["jpeg", "webp"], default="jpeg", help="of the images written")
    add("--quality", type=int, default=95, help="of images encoded anew")
    add("--exif", choices=["apply", "keep"], default=None, help="default: keep for imagenet1k")
    shards = build.add_argument_group("shards")
    add = shards.add_argument
    add("--shard-bytes", type=_size, default=1 << 30, metavar="SIZE", help="at most (1G)")
    add(
        "--gather",
        action="store_true",
        help="first copy each shard's images together, reading the source front to back: for"
        " spinning disks; needs the data's size once more on the disk of --out",
    )
    add("--shard-samples", type=int, default=0, metavar="N", help="at most; 0: no limit")


def run_build(arguments: argparse.Namespace) -> int:
    """The ``build`` command."""
    from data_prep.build import build
    from data_prep.options import Options, Rules

    values = vars(arguments)
    rules = {name: values[name] for name in Rules.__dataclass_fields__.keys() & values.keys()}
    rules["perceptual"] = arguments.exclude_distance > 0
    rules["exif"] = rules["exif"] or ("keep" if arguments.dataset == "imagenet1k" else "apply")
    names = Options.__dataclass_fields__.keys() & values.keys()
    options = Options(
        sources=_absolute(arguments.source),
        rules=Rules(**rules),
        **{name: values[name] for name in names - {"exclude", "out"}},
        exclude=_absolute(arguments.exclude),
        out=arguments.out.absolute(),
    )
    build(options)
    return 0


def _absolute(paths: Sequence[str]) -> tuple[str, ...]:
    """The same command may be given again from another directory."""
    return tuple(str(Path(path).absolute()) for path in paths)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser("verify", help="check shards against their manifest")
    verify.set_defaults(run=run_verify)
    verify.add_argument("directory", type=Path, metavar="DIR", help="shards, or --out of a build")
    verify.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    verify.add_argument(
        "--decode",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of images to decode; 1 all",
    )

    verify.add_argument("--repair", action="store_true", help="rebuild bad shards from the source")


def run_verify(arguments: argparse.Namespace) -> int:
    """The ``verify`` command: exit status 1 where anything is wrong."""
    return max(_verify(arguments, part) for part in _shard_directories(arguments.directory))


def _shard_directories(directory: Path) -> list[Path]:
    """The directory itself, or the parts a build has written into it."""
    from l2vit.data.manifest import MANIFEST_NAME

    if (directory / MANIFEST_NAME).exists():
        return [directory]
    parts = [directory / part for part in ("train", "val", "test")]
    return [part for part in parts if (part / MANIFEST_NAME).exists()] or [directory]


def _verify(arguments: argparse.Namespace, directory: Path) -> int:
    from data_prep.verify import repair, verify

    manifest, findings = verify(directory, decode=arguments.decode, workers=arguments.workers)
    for finding in findings:
        print(f"data_prep verify: error: {finding.problem}", file=sys.stderr)
    if findings and arguments.repair:
        findings = repair(directory, manifest, findings)
        for finding in findings:
            print(f"data_prep verify: error: not mended: {finding.problem}", file=sys.stderr)
    if findings:
        return 1
    print(f"{directory}: {manifest.samples:,} samples in {len(manifest.shards)} shards: ok")
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="one HTML page about a shard directory")
    report.set_defaults(run=run_report)
    report.add_argument("directory", type=Path, metavar="DIR", help="shards, or --out of a build")
    report.add_argument("--out", type=Path, default=None, help="default: DIR/report.html")


def run_report(arguments: argparse.Namespace) -> int:
    """The ``report`` command."""
    from data_prep.report import write_report

    directories = _shard_directories(arguments.directory)
    if arguments.out and len(directories) > 1:
        raise ConfigError(
            f"--out is one page, {arguments.directory} holds {len(directories)} parts"
        )
    for directory in directories:
        print(f"wrote {write_report(directory, arguments.out)}")
    return 0


def _add_digits(commands: argparse._SubParsersAction) -> None:
    digits = commands.add_parser("digits", help="write a small real raw release to try things on")
    digits.set_defaults(run=run_digits)
    digits.add_argument("--out", required=True, type=Path, metavar="DIR")
    digits.add_argument("--side", type=int, default=64, metavar="PX")


def run_digits(arguments: argparse.Namespace) -> int:
    """The ``digits`` command."""
    from data_prep.digits import write_digits

    print(f"wrote {write_digits(arguments.out, arguments.side)}: 1,797 images in 10 classes")
    return 0


@cli.program("data_prep")
def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be UTF-8
    parser = cli.parser("python -m data_prep", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_build, _add_verify, _add_report, _add_digits):
        add(commands)
    arguments = parser.parse_args(argv)
    return cli.run(lambda: arguments.run(arguments), program=f"data_prep {arguments.command}")


if __name__ == "__main__":
    sys.exit(main())
