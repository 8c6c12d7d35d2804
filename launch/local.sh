#!/usr/bin/env bash
# Runs a command as several processes on this machine that know of each other.
#
#     launch/local.sh --processes 2 -- bigssl run --config experiments/quickstart.py --workdir runs/two
#
# Options:
#   --processes N     how many (default 2)
#   --port P          of the first process, where the others find it (default: a free one)
#   --grace S         seconds that the others have to end once one has failed (default 60)
#   --max-stalled K   restarts in a row that may save nothing new (default 3)
#   --dry-run         print the commands and stop
#
# Every line of output starts with the number of its process.  Ctrl-C and SIGTERM are passed on, so
# all of them save and stop; a second one stops them at once.  When one process fails the others are
# stopped and its exit code is ours.  Exit code 75 (asked to stop, state saved) without anyone having
# asked this script starts all of them again.

source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

PROCESSES=2
PORT=
GRACE=60
SIGNALS=0  # how many this script was sent
STARTING=1 # empty while all of the processes run and are in `pids`
PENDING=() # signals sent meanwhile
pids=()

options() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --processes) PROCESSES=$(option_value "$@"); shift ;;
      --port) PORT=$(option_value "$@"); shift ;;
      --grace) GRACE=$(option_value "$@"); shift ;;
      --max-stalled) MAX_STALLED=$(option_value "$@"); shift ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage; exit ;;
      --) shift; COMMAND=("$@"); return ;;
      *) die "unknown option $(quoted "$1"); the command to run stands after '--' (see --help)" ;;
    esac
    shift
  done
}

port_is_free() { ! (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000)) # below the range from which the kernel lends ports
    if port_is_free "$port"; then printf '%s' "$port" && return; fi
  done
}

# environment NUMBER PORT: what makes a process one of several.
environment() {
  variables=(
    "BIGSSL_COORDINATOR=127.0.0.1:$2"
    "BIGSSL_NUM_PROCESSES=$PROCESSES"
    "BIGSSL_PROCESS_ID=$1"
  )
}

pass_on() {
  SIGNALS=$((SIGNALS + 1))
  if [[ $STARTING ]]; then PENDING+=("$1") && return; fi
  [[ ! ${pids[*]-} ]] || kill -s "$1" "${pids[@]}" 2>/dev/null || true
}

# Waits until `pids` is empty; sets `code` to that of the first that failed, else 0.
wait_for_all() {
  local ended='' status deadline=''
  code=0
  while [[ ${#pids[@]} -gt 0 ]]; do
    status=0
    if [[ $deadline ]]; then
      sleep 0.1
      collect_ended
      if [[ $SECONDS -ge $deadline && ${#pids[@]} -gt 0 ]]; then
        say "still running after $GRACE s: killed"
        kill -s KILL "${pids[@]}" 2>/dev/null || true
        deadline=$((SECONDS + GRACE + 1))
      fi
      continue
    fi
    wait -n -p ended "${pids[@]}" || status=$?
    [[ ${ended-} ]] || continue # a signal came in between; pass_on has dealt with it
    forget "$ended"
    [[ $status -ne 0 && $code -eq 0 ]] || continue
    code=$status
    [[ ${#pids[@]} -gt 0 ]] || continue
    deadline=$((SECONDS + GRACE))
    # Whoever was told to stop is saving: a second signal would stop that at once.
    if [[ $SIGNALS -eq 0 && $code -ne $EXIT_STOPPED ]]; then
      say "process ${numbers[$ended]} ended with exit code $code; stopping the others"
      kill -s TERM "${pids[@]}" 2>/dev/null || true
    fi
  done
}

collect_ended() {
  local pid
  for pid in "${pids[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      wait "$pid" || true
      forget "$pid"
    fi
  done
}

forget() {
  local pid left=()
  for pid in "${pids[@]}"; do [[ $pid == "$1" ]] || left+=("$pid"); done
  pids=(${left[@]+"${left[@]}"})
}

# One attempt: starts all processes, waits for them, sets `code`.
attempt() {
  local port=${PORT:-$(free_port)} number output signal printers=()
  local -A numbers=()
  local -a variables
  pids=()
  for ((number = 0; number < PROCESSES; number++)); do
    environment "$number" "$port"
    # The printers outlive a Ctrl-C: what the processes still have to say must go somewhere.
    exec {output}> >(trap '' INT TERM && exec sed -u "s/^/[$number] /")
    printers+=($!)
    env "${variables[@]}" "${COMMAND[@]}" </dev/null >&"$output" 2>&1 &
    pids+=($!)
    numbers[$!]=$number
    exec {output}>&-
  done
  STARTING=
  for signal in ${PENDING[@]+"${PENDING[@]}"}; do
    kill -s "$signal" "${pids[@]}" 2>/dev/null || true
  done
  PENDING=()
  wait_for_all
  STARTING=1
  wait "${printers[@]}" || true
}

main() {
  options "$@"
  check_count --processes "$PROCESSES" 1
  check_count --grace "$GRACE" 0
  check_count --max-stalled "$MAX_STALLED" 0
  if [[ $PORT ]]; then
    check_count --port "$PORT" 1
    [[ $PORT -le 65535 ]] || die "--port $PORT: 65535 is the highest"
    [[ $DRY_RUN ]] || port_is_free "$PORT" || die "--port $PORT is in use; name another, or none"
  fi
  check_command "$PWD"
  if [[ $DRY_RUN ]]; then
    local number
    local -a variables
    for ((number = 0; number < PROCESSES; number++)); do
      environment "$number" "${PORT:-PORT}"
      step env "${variables[@]}" "${COMMAND[@]}"
    done
    return
  fi
  # Job control: each process has a group of its own, so that Ctrl-C reaches this script alone.
  set -m
  trap 'pass_on TERM' TERM
  trap 'pass_on INT' INT
  local before after code
  while true; do
    before=$(progress_of "$(command_option --workdir)")
    attempt
    [[ $code -eq $EXIT_STOPPED && $SIGNALS -eq 0 ]] || exit "$code"
    after=$(progress_of "$(command_option --workdir)")
    count_stalled "$before" "$after"
    [[ $STALLED -le $MAX_STALLED ]] ||
      { say "$STALLED attempts in a row saved nothing new; giving up" && exit "$code"; }
    say 'stopped with its state saved; starting again'
  done
}

main "$@"
