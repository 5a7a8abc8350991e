"""Upload an exported directory to a model repository of Hugging Face's hub.

`python -m finetune publish --repo USER/NAME DIR [--dry-run]`   Log in with `hf auth login` first.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2vit import cli, files
from l2vit.errors import ConfigError, UserError

_NAME = "finetune publish"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CERTIFICATE = "certificate.json"
_NEEDED = ("README.md", "config.json", "model.safetensors")


@cli.program(_NAME)
def main(argv: Sequence[str]) -> None:
    """The program; returns its exit status."""
    _run(cli.parse(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune publish", __doc__)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="what python -m finetune export made")
    add("--repo", required=True, metavar="USER/NAME", help="made if it does not exist")
    add("--private", action="store_true", help="a repository others do not see")
    add("--message", default="", help="of the commit")
    add("--dry-run", action="store_true", help="show the files and upload nothing")
    return parser


def _run(options: argparse.Namespace) -> None:
    if not _REPO.fullmatch(options.repo):
        raise ConfigError(f"--repo {options.repo!r}: give USER/NAME")
    names = certified(options.directory)
    for name in names:
        size = (options.directory / name).stat().st_size
        print(f"{size / 2**20:10.2f} MiB  {name}")
    if options.dry_run:
        print(f"dry run: nothing was uploaded to {options.repo}", flush=True)
        return
    address = upload(
        options.directory,
        names,
        repo=options.repo,
        private=options.private,
        message=options.message or f"{options.directory.name}, exported with its certificate",
    )
    print(f"published {options.directory}: {address}", flush=True)


def certified(directory: Path) -> list[str]:
    """Names of the files of an export, each as its certificate says; the certificate is the last.

    Raises:
        UserError: no export, a file that has changed since the proof, or one it does not know.
    """
    if not (directory / _CERTIFICATE).is_file():
        raise UserError(
            f"{directory} holds no {_CERTIFICATE}: make it with python -m finetune export"
        )
    hashes = files.read_json(directory / _CERTIFICATE, what="certificate").get("sha256")
    if not isinstance(hashes, dict) or not set(_NEEDED) <= hashes.keys():
        raise UserError(f"{directory / _CERTIFICATE} names none of {', '.join(_NEEDED)}")
    there = {path.name for path in directory.iterdir()}
    strange = sorted(there - hashes.keys() - {_CERTIFICATE})
    if strange:
        raise UserError(f"{directory / strange[0]} is not part of the export; take it away")
    for name, digest in sorted(hashes.items()):
        if name not in there or files.sha256_file(directory / name) != digest:
            raise UserError(
                f"{directory / name} is not what was proven ({_CERTIFICATE}); export again"
            )
    return [*sorted(hashes), _CERTIFICATE]


def upload(directory: Path, names: Sequence[str], *, repo: str, private: bool, message: str) -> str:
    """Upload ``names`` in one commit; files of the repository that are not among them stay.

    Returns:
        The commit's address.

    Raises:
        UserError: not logged in, no right to write there, or no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api: Any = HfApi()
    operations = [CommitOperationAdd(name, str(directory / name)) for name in names]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except LocalTokenNotFoundError:
        raise UserError("not logged in: run 'hf auth login', or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(f"{repo} at {api.endpoint}: {_refusal(error)}") from error
    except Exception as error:
        # The package of the connection's errors is httpx or httpx2, by the hub client's version.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise UserError(f"cannot reach {api.endpoint}: {error}") from error


def _refusal(error: Any) -> str:
    status = getattr(error.response, "status_code", 0)
    if status in (401, 403):
        return f"refused ({status}): run 'hf auth login' with a token that may write there"
    return str(error).partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
