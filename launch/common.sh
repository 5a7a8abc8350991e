# Sourced by the launchers. Finds the interpreter and hands over to Python, which does the rest.

project_root() { (cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd); }

# The active virtual environment, then the project's own, then whatever python3 is.
find_python() {
  local root=$1
  if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    echo "$VIRTUAL_ENV/bin/python"
  elif [ -x "${L2VIT_VENV:-$root/.venv}/bin/python" ]; then
    echo "${L2VIT_VENV:-$root/.venv}/bin/python"
  else
    command -v python3 || { echo "no python3 found: activate a virtual environment" >&2; exit 1; }
  fi
}

# launch SCRIPT ARGS: become one rank where srun started us as one task of several, else the
# supervisor, which starts the ranks on this node and, over ssh, on others.
launch() {
  local script=$1 root python
  shift
  root=$(project_root)
  python=$(find_python "$root") || exit 1
  "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    torch timm deepspeed || {
    echo "$python lacks torch, timm or deepspeed: run 'bash launch/install.sh' or activate the" \
      "environment that has them" >&2
    exit 1
  }
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  # shellcheck source=/dev/null
  [ -z "${L2VIT_ENVIRONMENT:-}" ] || { set -a; . "$L2VIT_ENVIRONMENT"; set +a; }
  if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
    exec "$python" -u "$script" "$@"
  fi
  exec "$python" -u -m l2vit.launch "$script" "$@"
}
