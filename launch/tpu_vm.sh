#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU that is requested as a queued resource.
#
#     launch/tpu_vm.sh up --name pod --zone us-west4-a --topology v5e-256 --spot --bucket B -- \
#         bigssl run --config experiments/X.py --workdir /mnt/B/runs/x
#
#     up       create, wait, install, run, then watch: after a preemption all of it again
#     create   request the TPU                      wait     until it is there
#     install  this commit, on all workers          run      start the command on all workers
#     watch    until the run is done; start again after a preemption or exit code 75
#     status   of the request and of the workers    logs     follow the log of a worker
#     stop     let the run save and stop            delete   the TPU; only what was created here
#
# Options:
#   --name N          what to call it
#   --zone Z          where (create, up)
#   --topology T      v5e-256, v4-512, 2xv5e-256, ... (create, up)
#   --spot            cheap, and may be taken away at any moment (create, up)
#   --reserved        from your reservation (create, up)
#   --bucket B        mount this bucket at /mnt/B on every worker (create, up)
#   --project P       default: that of gcloud (create, up)
#   --network NET --subnetwork NET --service-account A --runtime-version V   (create, up)
#   --worker W        whose log: a number or all (logs; default 0)
#   --slice I         of which slice (logs; default 0)
#   --wait-minutes M  how long to wait for the TPU (default 0: for ever)
#   --stop-seconds S  how long to wait until the run has saved (default 600)
#   --max-stalled K   restarts in a row that may save nothing new (default 3)
#   --dry-run         print the commands and stop

source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

ZONE=
TOPOLOGY=
TIER=
BUCKET=
PROJECT=
EXTRA=() # options of `queued-resources create` that are passed on
RUNTIME=
WORKER=0
SLICE=0
WAIT_MINUTES=0
STOP_SECONDS=600

options() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --name) NAME=$(option_value "$@"); shift ;;
      --zone) ZONE=$(option_value "$@"); shift ;;
      --topology) TOPOLOGY=$(option_value "$@"); shift ;;
      --spot | --reserved)
        [[ ! $TIER || $TIER == "$1" ]] || die '--spot and --reserved exclude each other'
        TIER=$1
        ;;
      --bucket) BUCKET=$(option_value "$@"); shift ;;
      --project) PROJECT=$(option_value "$@"); shift ;;
      --network | --subnetwork | --service-account)
        check_word "$1" "$(option_value "$@")"
        EXTRA+=("$1=$2")
        shift
        ;;
      --runtime-version) RUNTIME=$(option_value "$@"); shift ;;
      --worker) WORKER=$(option_value "$@"); shift ;;
      --slice) SLICE=$(option_value "$@"); shift ;;
      --wait-minutes) WAIT_MINUTES=$(option_value "$@"); shift ;;
      --stop-seconds) STOP_SECONDS=$(option_value "$@"); shift ;;
      --max-stalled) MAX_STALLED=$(option_value "$@"); shift ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage; exit ;;
      --) shift; COMMAND=("$@"); break ;;
      *) die "unknown option $(quoted "$1"); the command to run stands after '--' (see --help)" ;;
    esac
    shift
  done
  check_name
  check_count --wait-minutes "$WAIT_MINUTES" 0
  check_count --stop-seconds "$STOP_SECONDS" 1
  check_count --max-stalled "$MAX_STALLED" 0
  check_count --slice "$SLICE" 0
  [[ $WORKER == all ]] || check_count --worker "$WORKER" 0
  need gcloud 'see https://cloud.google.com/sdk/docs/install'
}

# What holds for a new TPU, checked before it is requested.
check_new() {
  check_zone
  accelerator "$TOPOLOGY"
  [[ $ACCELERATOR_TYPE != - ]] || die "--topology $TOPOLOGY is offered on GKE only: use launch/gke.sh"
  [[ ! $RUNTIME ]] || check_word --runtime-version "$RUNTIME"
  [[ ! $PROJECT ]] || check_word --project "$PROJECT"
  check_bucket
  [[ ${#COMMAND[@]} -eq 0 ]] || check_run
}

check_run() {
  check_command
  check_shared_workdir
}

check_cloud() {
  local account offered
  account=$(ask you gcloud auth list '--filter=status:ACTIVE' '--format=value(account)')
  [[ $account ]] || die "nobody is logged in; run 'gcloud auth login'"
  if [[ ! $PROJECT ]]; then
    PROJECT=$(ask PROJECT gcloud config get-value project 2>/dev/null)
    [[ $PROJECT && $PROJECT != '(unset)' ]] ||
      die "no project; give --project or run 'gcloud config set project PROJECT'"
  fi
  offered=$(ask "$ACCELERATOR_TYPE" gcloud compute tpus accelerator-types list "--zone=$ZONE" \
    "--project=$PROJECT" "--filter=type=$ACCELERATOR_TYPE" '--format=value(type)') ||
    die "--zone $ZONE cannot be asked for its TPUs (what gcloud says stands above)"
  [[ $offered == *"$ACCELERATOR_TYPE"* ]] ||
    die "--zone $ZONE does not offer $ACCELERATOR_TYPE; 'gcloud compute tpus locations list' shows the zones"
}

# ---------------------------------------------------------------------------------------------
# the queued resource

# queued VERB [OPTION...]: the words of a gcloud command on our queued resource.
queued() {
  local verb=$1
  shift
  words=(gcloud compute tpus queued-resources "$verb" "$NAME" "--zone=$ZONE" "--project=$PROJECT" "$@")
}

# Its state, or nothing when there is none.  Fails when the cloud cannot be asked: a lost connection
# must not look like a lost TPU.
resource_state() { # WHAT A DRY RUN SUPPOSES
  ask "$1" gcloud compute tpus queued-resources list "--zone=$ZONE" "--project=$PROJECT" \
    "--filter=name~/queuedResources/$NAME\$" '--format=value(state.state)'
}

# The label that we put on it, or nothing.
resource_mark() {
  local -a words
  queued describe '--format=value(tpu.nodeSpec[0].node.labels.bigssl-launch)'
  ask "$(mark)" "${words[@]}" 2>/dev/null || true
}

mark() { if [[ $DRY_RUN ]]; then printf '%s' "$MARK"; else state_get mark; fi; }

request() {
  local -a words nodes=("--node-id=$NAME")
  [[ $SLICES -eq 1 ]] || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
  queued create "${nodes[@]}" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=${RUNTIME:-$RUNTIME_VERSION}" "--labels=bigssl-launch=$(mark)" \
    ${TIER:+"$TIER"} ${EXTRA[@]+"${EXTRA[@]}"}
  step "${words[@]}"
}

create() {
  local existing
  check_new
  state_free tpu_vm
  check_cloud
  existing=$(resource_state '')
  [[ ! $existing ]] ||
    die "a queued resource $NAME exists in $ZONE, not created here; choose another --name"
  state_begin tpu_vm
  MARK=$(new_mark)
  state_set mark "$MARK"
  state_set zone "$ZONE"
  state_set project "$PROJECT"
  state_set topology "$TOPOLOGY"
  state_set tier "$TIER"
  state_set bucket "$BUCKET"
  state_set runtime "$RUNTIME"
  state_set extra ${EXTRA[@]+"${EXTRA[@]}"}
  # Written before the request: a request that is cut short can still be deleted.
  if ! request; then
    say 'the request failed (what gcloud says stands above); cleaning up'
    existing=$(resource_state '')
    [[ ! $existing ]] || release
    state_end
    exit 1
  fi
  report "requested $TOPOLOGY as $NAME; it costs from the moment it is there until 'tpu_vm.sh delete --name $NAME'"
}

recall() {
  state_open tpu_vm
  ZONE=$(state_get zone) PROJECT=$(state_get project) TOPOLOGY=$(state_get topology)
  TIER=$(state_get tier) BUCKET=$(state_get bucket) RUNTIME=$(state_get runtime) MARK=$(state_get mark)
  mapfile -d '' -t EXTRA <"$STATE/extra"
  [[ ${EXTRA[*]-} ]] || EXTRA=()
  accelerator "$TOPOLOGY"
}

# Deletes the queued resource and its nodes, if it carries our mark.
release() {
  local -a words
  local found
  found=$(resource_mark)
  [[ $found == "$(mark)" ]] ||
    die "$NAME in $ZONE is not the one that was created here (its mark is '${found:-none}'): left alone"
  queued delete --force --quiet
  step "${words[@]}"
}

# Fails when the TPU will not come.  A cloud that cannot be asked is asked again.
wait_until_active() {
  local state previous='' deadline=0
  [[ $WAIT_MINUTES -eq 0 ]] || deadline=$((SECONDS + 60 * WAIT_MINUTES))
  while true; do
    state=$(resource_state ACTIVE) || state=unknown
    [[ $state == "$previous" ]] || report "$NAME: ${state:-gone}"
    previous=$state
    case $state in
      ACTIVE) return ;;
      '' | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    [[ $deadline -eq 0 || $SECONDS -lt $deadline ]] ||
      die "$NAME is not there after $WAIT_MINUTES minutes; it stays in the queue ('wait' waits on, 'delete' withdraws it)"
    sleep "$POLL_SECONDS"
  done
}

will_not_come() {
  die "$NAME will not come; 'gcloud compute tpus queued-resources describe $NAME --zone=$ZONE' says why, 'tpu_vm.sh delete --name $NAME' clears it away"
}

# ---------------------------------------------------------------------------------------------
# the workers

nodes() {
  local i
  if [[ $SLICES -eq 1 ]]; then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do printf '%s-%d\n' "$NAME" "$i"; done
  fi
}

# ssh_to NODE WORKER COMMAND...: the words of the gcloud command that runs COMMAND there.  The remote
# shell reads the one text after --command; `quoted` makes it read exactly these words.
ssh_to() {
  local node=$1 worker=$2
  shift 2
  words=(gcloud compute tpus tpu-vm ssh "$node" "--zone=$ZONE" "--project=$PROJECT"
    "--worker=$worker" "--command=$(quoted "$@")")
}

# on_workers COMMAND...: on all workers of all slices.
on_workers() {
  local node failed=
  local -a words jobs=()
  while read -r node; do
    ssh_to "$node" all "$@"
    if [[ $DRY_RUN ]]; then
      step "${words[@]}"
    else
      "${words[@]}" </dev/null &
      jobs+=($!)
    fi
  done < <(nodes)
  for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || failed=1; done
  [[ ! $failed ]]
}

# What runs is a commit: the same files on all workers, and on those of the next TPU.
check_committed() {
  local changes
  changes=$(git -C "$REPOSITORY" status --porcelain)
  [[ $DRY_RUN || ! $changes ]] ||
    die 'the work tree has changes that are in no commit, so the workers would not get them; commit first'
}

install_project() {
  local node archive=$STATE/source.tar.gz
  check_committed
  step git -C "$REPOSITORY" archive --format=tar.gz --prefix=bigssl/ -o "$archive" HEAD || return
  while read -r node; do
    step gcloud compute tpus tpu-vm scp "$archive" "$node:bigssl.tar.gz" \
      "--zone=$ZONE" "--project=$PROJECT" --worker=all </dev/null || return
  done < <(nodes)
  on_workers tar -xzf bigssl.tar.gz || return
  on_workers bash bigssl/launch/worker.sh install ${BUCKET:+"$BUCKET"}
}

run() {
  [[ $DRY_RUN ]] || rm -f -- "$STATE/stopping"
  state_set command "${COMMAND[@]}"
  on_workers bash bigssl/launch/worker.sh start "${COMMAND[@]}"
}

# How the run stands on all workers: running, ended CODE, or gone when the workers do not answer.
outcome() {
  local lines code
  lines=$(on_workers bash bigssl/launch/worker.sh status 2>/dev/null) || { echo gone && return; }
  [[ ! $DRY_RUN ]] || lines='ended 0'
  # One that failed decides; then one that still runs; then one that was stopped.
  while read -r _ code; do
    [[ ${code:-0} -eq 0 || $code -eq $EXIT_STOPPED ]] || { echo "ended $code" && return; }
  done < <(grep -x 'ended [0-9]*' <<<"$lines")
  case $lines in
    *running*) echo running ;;
    *"ended $EXIT_STOPPED"*) echo "ended $EXIT_STOPPED" ;;
    *'ended 0'*) echo 'ended 0' ;;
    *) echo "${lines%%$'\n'*}" ;;
  esac
}

# The TPU was taken away: clear the request, make it again, install, start.  The mark tells a watch
# that was cut short in here that the TPU is missing because of us, not because someone deleted it.
recreate() {
  local state
  say "$NAME was preempted; requesting it again"
  state_set recreating yes
  state=$(resource_state SUSPENDED)
  while [[ $state == SUSPENDING ]]; do
    sleep "$POLL_SECONDS"
    state=$(resource_state SUSPENDED)
  done
  [[ ! $state ]] || release
  request
  rm -f -- "$STATE/recreating"
  # Taken away again on the way there: the watch sees it.
  wait_until_active || return 0
  if ! { install_project && run; }; then
    state=$(resource_state ACTIVE)
    [[ $state != ACTIVE ]] ||
      die "the project could not be installed on $NAME (see above); the TPU is there: 'install' and 'run', or 'delete'"
  fi
}

restart() { # RECREATE OR run
  local after
  after=$(progress_of "$(command_option --workdir)")
  count_stalled "$before" "$after"
  before=$after
  [[ $STALLED -le $MAX_STALLED ]] ||
    { say "$STALLED attempts in a row saved nothing new; giving up (the TPU is still there: 'tpu_vm.sh delete --name $NAME')" && exit 1; }
  "$1"
}

watch_run() {
  local before state result said=''
  before=$([[ $DRY_RUN ]] || progress_of "$(command_option --workdir)")
  while true; do
    [[ $DRY_RUN || -d $STATE ]] || die "$NAME was deleted meanwhile"
    result=$(outcome)
    state=$(resource_state ACTIVE) || state=unknown
    [[ $state:$result == "$said" ]] || report "$NAME: $state, the run: $result"
    said=$state:$result
    case $state:$result in
      *:'ended 0')
        report "the run is done; the TPU is still there: 'tpu_vm.sh delete --name $NAME'"
        return
        ;;
      *:"ended $EXIT_USER_ERROR")
        say "the run ended with something to mend; 'tpu_vm.sh logs --name $NAME' says what"
        exit "$EXIT_USER_ERROR"
        ;;
      SUSPEND*:* | FAILED:*) restart recreate ;;
      :*)
        [[ -f $STATE/recreating ]] || die "$NAME is gone, and not by preemption: it stays so"
        restart recreate
        ;;
      unknown:* | *:running | *:gone) ;; # no answer from a TPU that is there: ask again
      *:'never started') die "nothing was started on $NAME; 'tpu_vm.sh run --name $NAME -- COMMAND'" ;;
      *:ended*)
        if [[ -e $STATE/stopping ]]; then
          say 'stopped as asked; the same command continues'
          exit "$EXIT_STOPPED"
        fi
        say "the run ${result/ended/ended with exit code}; starting it again"
        on_workers bash bigssl/launch/worker.sh stop "$STOP_SECONDS" >/dev/null
        restart run
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# ---------------------------------------------------------------------------------------------
# verbs

main() {
  local verb=${1-}
  [[ $# -eq 0 ]] || shift
  case $verb in
    up | create | wait | install | run | watch | status | logs | stop | delete) ;;
    -h | --help | '') usage; exit ;;
    *) die "unknown verb $(quoted "$verb"); one of up create wait install run watch status logs stop delete" ;;
  esac
  options "$@"
  # One statement a line: in a list with && a failure inside a function would not end the script.
  case $verb in
    create)
      create
      ;;
    up)
      [[ ${#COMMAND[@]} -gt 0 ]] || check_command
      check_committed
      create
      still_there
      wait_until_active || will_not_come
      install_project
      run
      watch_run
      ;;
    *)
      recall
      "on_existing_$verb"
      ;;
  esac
}

# Ctrl-C ends this script, not what it started.
still_there() {
  trap 'say "$NAME goes on without this script: watch, stop or delete it"; exit 130' INT
}

on_existing_wait() { wait_until_active || will_not_come; }
on_existing_install() { install_project; }
on_existing_run() {
  check_run
  run
}
on_existing_watch() {
  state_command
  still_there
  watch_run
}
on_existing_status() {
  printf 'TPU: %s\n' "$(resource_state ACTIVE)"
  on_workers bash bigssl/launch/worker.sh status || true
}
on_existing_logs() {
  local -a words
  local node=$NAME
  [[ $SLICE -lt $SLICES ]] || die "--slice $SLICE: $NAME has $SLICES, counted from 0"
  [[ $SLICES -eq 1 ]] || node=$NAME-$SLICE
  ssh_to "$node" "$WORKER" bash bigssl/launch/worker.sh logs
  step "${words[@]}"
}
on_existing_stop() {
  [[ $DRY_RUN ]] || : >"$STATE/stopping"
  on_workers bash bigssl/launch/worker.sh stop "$STOP_SECONDS"
}
on_existing_delete() {
  local state
  state=$(resource_state ACTIVE)
  if [[ $state ]]; then release; else say "$NAME is gone already"; fi
  state_end
}

main "$@"
