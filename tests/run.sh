#!/usr/bin/env bash
# Runs the tests on a bare machine; arguments go to pytest (tests/run.sh tests/models -k window).
# L2VIT_PYTHON names an interpreter that has everything already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${L2VIT_PYTHON:-$(bash launch/install.sh requirements-dev.txt)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
if [ $# -eq 0 ]; then
  # One worker a core (nproc alone would answer OMP_NUM_THREADS); a file stays on one worker, so
  # that module fixtures are made once. Files begin in the order of tests/conftest.py. A worker
  # whose test ends its process is not replaced: the next would only run that test again.
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
  set -- -n "$((cores < 8 ? cores : 8))" --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0
fi
exec "$python" tests/and_all_it_started.py "$python" -m pytest "$@"
