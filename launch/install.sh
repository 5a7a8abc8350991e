#!/usr/bin/env bash
# Makes .venv in the project's root and installs requirements into it, if that is not done yet.
# Usage: launch/install.sh [requirements.txt]   Prints the interpreter's path as its last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements.txt}
venv=${L2VIT_VENV:-.venv}
say() { printf '[set-up] %s\n' "$*" >&2; }

find_python() {
  for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "error: Python 3.11 or newer not found; install it or set PYTHON=/path/to/python3.11"
  exit 2
}

# A stamp a requirements file, so that a changed list installs again and an unchanged one does not.
stamp=$venv/installed-$(basename "$requirements" .txt)-$(cat "$requirements" requirements.txt constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
      say "error: '$python -m venv' failed; on Debian and Ubuntu install the package python3-venv"
      exit 1
    }
  fi
  say "installing $requirements with constraints.txt (a few GB, some minutes the first time)"
  started=$SECONDS
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$requirements" -c constraints.txt >&2 || {
    say "error: pip could not install $requirements; its message is above; the same command tries again"
    exit 1
  }
  touch "$stamp"
  say "installed in $((SECONDS - started)) s"
fi
echo "$PWD/${venv#"$PWD"/}/bin/python"
