#!/usr/bin/env bash
# Runs a command on the GPUs of a SLURM cluster, one process a GPU.
#
#     launch/slurm.sh run --name pretrain --nodes 4 --gpus-per-node 8 --time 2-00:00:00 -- \
#         bigssl run --config experiments/X.py --workdir /shared/runs/x
#
#     run      submit the job; it puts itself into the queue again until the command is done
#     status   of the job                       logs     follow its log
#     stop     let the run save, and do not go on   delete   cancel the job at once
#
# Options:
#   --name N             what to call it
#   --nodes N --gpus-per-node G     (default 1 and 8; run)
#   --cpus-per-gpu C     (default 8; run)
#   --time T             limit of one go, as SLURM writes it: 90, 12:00:00, 2-00:00:00 (run)
#   --partition P --account A --qos Q --constraint C     passed on (run)
#   --warn-seconds S     SIGTERM this long before the limit, to save (default 600; run)
#   --max-stalled K      restarts in a row that may save nothing new (default 3; run)
#   --dry-run            print the commands and stop
#
# The folder of this script, the workdir and the Python environment lie on storage that all nodes see.

source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

NODES=1
GPUS=8
CPUS=8
TIME=
EXTRA=()
WARN=600

options() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --name) NAME=$(option_value "$@"); shift ;;
      --nodes) NODES=$(option_value "$@"); shift ;;
      --gpus-per-node) GPUS=$(option_value "$@"); shift ;;
      --cpus-per-gpu) CPUS=$(option_value "$@"); shift ;;
      --time) TIME=$(option_value "$@"); shift ;;
      --partition | --account | --qos | --constraint)
        check_word "$1" "$(option_value "$@")"
        EXTRA+=("$1=$2")
        shift
        ;;
      --warn-seconds) WARN=$(option_value "$@"); shift ;;
      --max-stalled) MAX_STALLED=$(option_value "$@"); shift ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage; exit ;;
      --) shift; COMMAND=("$@"); break ;;
      *) die "unknown option $(quoted "$1"); the command to run stands after '--' (see --help)" ;;
    esac
    shift
  done
  check_name
  need sbatch 'run this on a login node of the cluster'
}

check_run() {
  check_count --nodes "$NODES" 1
  check_count --gpus-per-node "$GPUS" 1
  check_count --cpus-per-gpu "$CPUS" 1
  check_count --warn-seconds "$WARN" 1
  [[ $WARN -le 65535 ]] || die "--warn-seconds $WARN: SLURM allows 65535 at most"
  check_count --max-stalled "$MAX_STALLED" 0
  [[ ! $TIME || $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] ||
    die "--time $(quoted "$TIME"): write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
  check_command
  check_shared_workdir
}

run() {
  local job
  check_run
  state_free slurm
  state_begin slurm
  state_set command "${COMMAND[@]}"
  # SIGTERM goes to the processes alone (no 'B:'), so the job script lives to requeue the job.
  # It is handed over as a file with arguments: no text is put together that a shell would read.
  local submit=(sbatch --parsable "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS"
    "--gpus-per-node=$GPUS" "--cpus-per-task=$CPUS" ${TIME:+"--time=$TIME"} "--signal=TERM@$WARN"
    --requeue --open-mode=append "--output=$STATE/log" "--chdir=$REPOSITORY"
    ${EXTRA[@]+"${EXTRA[@]}"}
    "$LAUNCH/slurm_job.sh" "$LAUNCH" "$STATE" "$MAX_STALLED" "${COMMAND[@]}")
  if ! job=$(ask JOB "${submit[@]}"); then
    state_end
    say 'the job was refused (what sbatch says stands above)'
    exit 1
  fi
  state_set job "${job%%;*}" # 'job;cluster' where there are several
  report "submitted as job ${job%%;*}; 'slurm.sh logs --name $NAME' follows it"
}

# The job of our name and number, and whether it waits or runs; nothing when it is over.
job_state() { ask RUNNING squeue --noheader "--jobs=$JOB" "--name=$NAME" '--format=%T' 2>/dev/null || true; }

main() {
  local verb=${1-}
  [[ $# -eq 0 ]] || shift
  case $verb in
    run | status | logs | stop | delete) ;;
    -h | --help | '') usage; exit ;;
    *) die "unknown verb $(quoted "$verb"); one of run status logs stop delete" ;;
  esac
  options "$@"
  if [[ $verb == run ]]; then
    run
    return
  fi
  state_open slurm
  JOB=$(state_get job)
  [[ $JOB ]] || die "$NAME has no job number: its submission was cut short; look with squeue --name=$NAME"
  case $verb in
    status) step squeue "--jobs=$JOB" "--name=$NAME" ;;
    logs) step tail -n 200 -F "$STATE/log" ;;
    stop)
      [[ $DRY_RUN ]] || : >"$STATE/stopping"
      case $(job_state) in
        RUNNING) step scancel --signal=TERM "--name=$NAME" "$JOB" ;;
        '') say "$NAME is not running" ;;
        *) step scancel "--name=$NAME" "$JOB" ;; # it waits: nothing to save
      esac
      ;;
    delete)
      [[ ! $(job_state) ]] || step scancel "--name=$NAME" "$JOB"
      state_end
      ;;
  esac
}

main "$@"
