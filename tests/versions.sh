#!/usr/bin/env bash
# Runs the tests with the lowest or the newest packages that requirements-dev.txt admits:
#   bash tests/versions.sh lowest|newest [pytest arguments]
# Both get an environment of their own, .versions/lowest and .versions/newest (L2VIT_VERSIONS names
# another directory), with the versions in installed.txt. What is newest changes: remove the
# environment to resolve again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  lowest) resolution=lowest-direct ;; # of what we name; what that needs is the newest it admits
  newest) resolution=highest ;;
  *)
    echo "usage: bash tests/versions.sh lowest|newest [pytest arguments]" >&2
    exit 2
    ;;
esac
environment=$(realpath -m "${L2VIT_VERSIONS:-.versions}/$1")
shift
unset VIRTUAL_ENV
if [ ! -e "$environment/installed.txt" ]; then
  "${PYTHON:-python3}" -m venv "$environment"
  uv=$environment/bin/uv
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check uv
  "$uv" pip compile --quiet --no-header --no-annotate --python "$environment/bin/python" \
    --resolution "$resolution" requirements-dev.txt --output-file "$environment/wanted.txt"
  "$uv" pip install --quiet --python "$environment/bin/python" -r "$environment/wanted.txt"
  mv "$environment/wanted.txt" "$environment/installed.txt"
fi
grep -E '^(torch|torchvision|timm|deepspeed|nvidia-dali-cuda130|numpy|pillow|pytest)==' \
  "$environment/installed.txt"
export L2VIT_VENV=$environment L2VIT_PYTHON=$environment/bin/python
exec bash tests/run.sh "$@"
