#!/usr/bin/env bash
# The job that slurm.sh submits: LAUNCH STATE MAX_STALLED COMMAND...
#
# SLURM copies this file away before it runs it, so it is told where its neighbours are.  Each go
# runs the command on all GPUs; exit code 75 (asked to stop, state saved: the time limit is near)
# puts the job into the queue again, unless `slurm.sh stop` has asked for the stop.  A job that SLURM
# preempts is requeued by SLURM itself.

source "$1/common.sh"
STATE=$2
MAX_STALLED=$3
shift 3
COMMAND=("$@")

[[ ! -e $STATE/stopping ]] || exit "$EXIT_STOPPED"
before=$(progress_of "$(command_option --workdir)")
code=0
# Once one process has ended the others have ten minutes: some still save when the first is through.
srun --kill-on-bad-exit=0 --wait=600 --label "${COMMAND[@]}" || code=$?
[[ $code -eq $EXIT_STOPPED && ! -e $STATE/stopping ]] || exit "$code"

STALLED=$(state_get stalled)
STALLED=${STALLED:-0}
count_stalled "$before" "$(progress_of "$(command_option --workdir)")"
state_set stalled "$STALLED"
if [[ $STALLED -gt $MAX_STALLED ]]; then
  say "$STALLED attempts in a row saved nothing new; giving up"
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
