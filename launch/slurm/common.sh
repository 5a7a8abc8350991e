# Sourced by the batch scripts: starts the ranks with srun, passes the warning on, queues again.
cd "$SLURM_SUBMIT_DIR" || exit 1
. launch/common.sh
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The address Slurm itself reaches the first node by.
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# Ranks of this start know each other by it; the tasks get it with their environment.
L2VIT_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export L2VIT_TOKEN

# run_ranks SCRIPT ARGS: exits with the ranks' status, after queueing the job again where another
# start may help (python -m l2vit.launch.requeue decides; never after scancel).
run_ranks() {
  local status=1 found step= told=0 caught=1 python
  python=$(find_python "$PWD") || exit 1
  # srun passes SIGUSR1 to every task; SIGTERM would end its step by force. The batch shell alone
  # gets the warning (--signal=B:), maybe before it knows srun's number.
  trap 'told=1 caught=1; echo "warned: asking the ranks to save"
    [ -z "$step" ] || kill -USR1 "$step"' USR1
  # scancel and preemption tell the tasks themselves: only wait for them.
  trap 'caught=1' TERM
  srun --kill-on-bad-exit=0 --wait=60 bash "$@" &
  step=$!
  [ "$told" -eq 0 ] || kill -USR1 "$step"
  # A trapped signal ends the wait early with a status of its own: ask again for srun's, which the
  # shell keeps until it has told it; 127 says that it has.
  while [ "$caught" -eq 1 ]; do
    caught=0
    wait "$step"
    found=$?
    [ "$found" -eq 127 ] || status=$found
  done
  PYTHONPATH=$PWD "$python" -m l2vit.launch.requeue --status "$status" --warned "$told" "$@"
  exit "$status"
}
