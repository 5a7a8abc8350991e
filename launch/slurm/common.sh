# Sourced by the batch scripts: starts the ranks with srun, passes signals on, queues again.
cd "$SLURM_SUBMIT_DIR" || exit 1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# run_ranks SCRIPT ARGS: exits with the ranks' status; 75 (stopped by a signal) queues again.
run_ranks() {
  local status=1 found step= told=0
  # srun passes SIGTERM to every task. The batch shell alone gets the warning (--signal=B:), maybe
  # before it knows srun's number.
  trap 'told=1; echo "signal: asking the ranks to save"; [ -z "$step" ] || kill -TERM "$step"' \
    USR1 TERM
  srun --kill-on-bad-exit=1 --wait=60 bash "$@" &
  step=$!
  [ "$told" -eq 0 ] || kill -TERM "$step"
  while :; do
    wait "$step"
    found=$?
    [ "$found" -eq 127 ] || status=$found
    # A trapped signal ends the wait early: wait again for the ranks themselves.
    [ "$told" -eq 1 ] || break
    told=0
  done
  if [ "$status" -eq 75 ]; then
    echo "stopped after saving: queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}
