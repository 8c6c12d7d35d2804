# shellcheck shell=bash disable=SC2034
# What the launchers share: messages, dry runs, quoting, checks, what they created, restarts.
#
# The hard idea is quoting.  A command travels as an array of words and becomes text in one place
# only, `quoted`, in the form that a remote Bash reads back as exactly those words.  Nothing here is
# ever evaluated, and no file that holds settings is ever sourced.
#
# Every launcher changes the world through `step` and reads it through `ask`; with --dry-run both
# print the command instead (fd 3 is the user's standard output), and `ask` answers its default.

set -euo pipefail
exec 3>&1

LAUNCH=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(dirname -- "$LAUNCH")
STATE_ROOT=${BIGSSL_LAUNCH_STATE:-$REPOSITORY/.launch}
# `make install` puts the program there; one that is active comes first.
PATH=$PATH:$REPOSITORY/.venv/bin

POLL_SECONDS=${BIGSSL_LAUNCH_POLL_SECONDS:-30}

EXIT_USER_ERROR=2 # as the `bigssl` command: something the user can mend, said in one line
EXIT_STOPPED=75   # asked to stop, state saved: the same command continues

# Options of every launcher.
DRY_RUN=
NAME=
MAX_STALLED=3
COMMAND=()

# ---------------------------------------------------------------------------------------------
# words

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# What has been done; a dry run has done nothing.
report() { [[ $DRY_RUN ]] || say "$@"; }

die() {
  say "$@"
  exit "$EXIT_USER_ERROR"
}

# The words as text that Bash reads back as the same words.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

# Runs a command that changes something; with --dry-run prints it.
step() {
  if [[ $DRY_RUN ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# ask DEFAULT COMMAND...: what a command that only reads prints; with --dry-run prints the command
# and answers DEFAULT.
ask() {
  local default=$1
  shift
  if [[ $DRY_RUN ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
    printf '%s\n' "$default"
  else
    "$@"
  fi
}

# The help of a script is the comment at its head.
usage() {
  sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"
}

# ---------------------------------------------------------------------------------------------
# checks: all of them before anything is touched

# option_value OPTION [VALUE...]: VALUE, which must be there.
option_value() {
  [[ $# -ge 2 ]] || die "$1 needs a value"
  printf '%s' "$2"
}

check_name() {
  [[ $NAME ]] || die '--name is missing: what shall this run be called?'
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--name $(quoted "$NAME"): lower-case letters, digits and '-', at most 40, starting with a letter"
}

# check_count OPTION VALUE LOWEST
check_count() {
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ && $2 -ge $3 ]] ||
    die "$1 $(quoted "$2"): a whole number, $3 or more"
}

# check_word OPTION VALUE: a name that some system gave, of characters that need no quoting.
check_word() {
  [[ $2 =~ ^[A-Za-z0-9]([-A-Za-z0-9_./:@]*[A-Za-z0-9])?$ ]] ||
    die "$1 $(quoted "$2"): letters, digits and any of -_./:@ are allowed"
}

check_zone() {
  [[ $ZONE ]] || die '--zone is missing, for example --zone us-west4-a'
  [[ $ZONE =~ ^[a-z]+(-[a-z]+)+[0-9]+-[a-z]$ ]] ||
    die "--zone $(quoted "$ZONE") is not a zone; they look like us-west4-a (a region and a letter)"
}

check_bucket() {
  [[ ! $BUCKET || $BUCKET =~ ^[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]$ ]] ||
    die "--bucket $(quoted "$BUCKET"): the name of a bucket, without gs://"
}

# need COMMAND HOW: the command is installed.  A dry run only prints, so it needs nothing.
need() {
  [[ $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not installed; $2"
}

# The cloud's names for a topology of the package, from accelerators.tsv.
# Sets SLICES, ACCELERATOR_TYPE, RUNTIME_VERSION, GKE_ACCELERATOR, GKE_TOPOLOGY, CHIPS_PER_HOST, HOSTS.
accelerator() {
  local wanted=$1 row known=()
  [[ $wanted ]] || die '--topology is missing, for example --topology v5e-256'
  SLICES=1
  if [[ $wanted =~ ^([1-9][0-9]{0,3})x([a-z].*)$ ]]; then
    SLICES=${BASH_REMATCH[1]}
    wanted=${BASH_REMATCH[2]}
  fi
  while IFS=$'\t' read -r -a row; do
    if [[ ${row[0]} == "$wanted" ]]; then
      ACCELERATOR_TYPE=${row[1]} RUNTIME_VERSION=${row[2]} GKE_ACCELERATOR=${row[3]}
      GKE_TOPOLOGY=${row[4]} CHIPS_PER_HOST=${row[5]} HOSTS=${row[6]}
      return
    elif [[ ${row[0]} == "${wanted%%-*}"-* ]]; then
      known+=("${row[0]}")
    fi
  done <"$LAUNCH/accelerators.tsv"
  [[ ${known[*]-} ]] || known=(v3-N v4-N v5e-N v5p-N v6e-N tpu7x-N)
  die "--topology $(quoted "$1") is unknown; known: ${known[*]}; several slices: 2x${known[-1]}"
}

# The value of `--option VALUE` or `--option=VALUE` in the command to run, or nothing.
command_option() {
  local i
  for ((i = 0; i < ${#COMMAND[@]}; i++)); do
    case ${COMMAND[i]} in
      "$1") printf '%s' "${COMMAND[i + 1]-}" && return ;;
      "$1="*) printf '%s' "${COMMAND[i]#*=}" && return ;;
    esac
  done
}

# check_command [FOLDER]: there is a command; if it is `bigssl run`, its config resolves here and now.
# It will run in FOLDER (default: the repository, as on the workers).
check_command() {
  local folder=${1:-$REPOSITORY} complaint
  [[ ${#COMMAND[@]} -gt 0 ]] ||
    die "what shall be run? After '--' write the command: -- bigssl run --config experiments/X.py --workdir DIR"
  [[ ${COMMAND[0]} == bigssl && ${COMMAND[1]-} == run ]] || return 0
  [[ $(command_option --workdir) ]] || die '--workdir is missing in the command to run'
  command -v bigssl >/dev/null ||
    die "the config cannot be checked: bigssl is not installed here; run 'make install' first"
  complaint=$(cd -- "$folder" && "${COMMAND[@]}" --check 2>&1 >/dev/null) ||
    die "the command would fail; nothing was started: ${complaint##*$'\n'}"
}

# The workdir is a place that every worker sees, and that outlives them.
check_shared_workdir() {
  local workdir
  [[ ${COMMAND[0]} == bigssl && ${COMMAND[1]-} == run ]] || return 0
  workdir=$(command_option --workdir)
  [[ $workdir == /?* ]] ||
    die "--workdir $(quoted "$workdir") would lie on each worker's own disk; give --bucket B and /mnt/B/..."
  [[ $workdir != /mnt/* || $workdir == "/mnt/${BUCKET:-?}/"* ]] ||
    die "--workdir $(quoted "$workdir"): no such bucket is mounted; give --bucket B and /mnt/B/..."
}

# ---------------------------------------------------------------------------------------------
# what this script created: .launch/KIND/NAME/, one file a setting.  What has no folder is not ours.

state_free() { # KIND
  STATE=$STATE_ROOT/$1/$NAME
  [[ ! -e $STATE ]] ||
    die "$NAME exists already ($STATE); go on with it, delete it, or choose another --name"
}

state_begin() { # KIND
  state_free "$1"
  if [[ ! $DRY_RUN ]]; then
    mkdir -p -- "$STATE_ROOT/$1"
    mkdir -- "$STATE" # atomic: of two launchers that choose one name, one goes on
  fi
}

state_open() { # KIND
  STATE=$STATE_ROOT/$1/$NAME
  [[ -d $STATE ]] ||
    die "$NAME was not created by this script here (no $STATE), so it is left alone"
}

state_set() { # KEY VALUE...
  local key=$1
  shift
  [[ $DRY_RUN ]] || printf '%s\0' "$@" >"$STATE/$key"
}

state_get() { # KEY
  local value=
  [[ ! -f $STATE/$1 ]] || IFS= read -r -d '' value <"$STATE/$1" || true
  printf '%s' "$value"
}

state_command() {
  [[ -f $STATE/command ]] || die "nothing was started on $NAME yet"
  mapfile -d '' -t COMMAND <"$STATE/command"
}

state_end() {
  [[ $DRY_RUN ]] || { rm -f -- "$STATE"/* && rmdir -- "$STATE"; }
}

# A mark that is also put on what is created, so that a namesake of somebody else is told apart.
new_mark() {
  local uuid
  read -r uuid </proc/sys/kernel/random/uuid
  printf 'run-%s' "${uuid%%-*}"
}

# ---------------------------------------------------------------------------------------------
# restarts

# What a workdir holds that a restart would build on.  The bucket that is mounted at /mnt/BUCKET on
# the workers is gs://BUCKET from outside.
progress_of() {
  local workdir=$1
  local kept=('*/done.json' '*/checkpoints/*' '*/labels/*' 'corpora/*/*')
  if [[ ${BUCKET-} && $workdir == "/mnt/$BUCKET/"* ]]; then
    workdir=gs://${workdir#/mnt/}
  fi
  if [[ $workdir == gs://* ]]; then
    # A pattern that matches nothing is an error to gcloud, and no progress to us.
    gcloud storage ls "${kept[@]/#/${workdir%/}/}" 2>/dev/null | sort || true
  elif [[ -d $workdir ]]; then
    # Unquoted on purpose: these are patterns, without a blank in them.
    # shellcheck disable=SC2068
    (cd -- "$workdir" && shopt -s nullglob && printf '%s\n' ${kept[@]} | sort)
  fi | grep -v -e '-tmp-' || true # half-written checkpoints
}

# count_stalled BEFORE AFTER: STALLED is the number of attempts in a row that saved nothing new.
STALLED=0
count_stalled() {
  if [[ $1 == "$2" ]]; then STALLED=$((STALLED + 1)); else STALLED=0; fi
}
