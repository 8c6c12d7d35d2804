#!/usr/bin/env bash
# Runs on every worker of a TPU pod: installs the project there, starts the run, watches over it.
# tpu_vm.sh calls it; by hand it is of use after `gcloud compute tpus tpu-vm ssh`.
#
#     worker.sh install [BUCKET]    a virtual environment beside this folder; BUCKET at /mnt/BUCKET
#     worker.sh start COMMAND...    in the background: a lost connection does not end the run
#     worker.sh status              'running', 'ended CODE' or 'never started'
#     worker.sh logs                the log from its last 200 lines on, until the run ends
#     worker.sh stop SECONDS        asks the run to save and stop, and waits for it
#
# ~/bigssl-run/ holds the log, the process number while it runs, and the exit code once it has ended.

set -euo pipefail

SOURCE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$HOME/bigssl-run

# A Python that the project supports; images for TPUs come with an older one.
find_python() {
  local name
  for name in python3.13 python3.12 python3.11; do
    if "$name" -m venv --help >/dev/null 2>&1 && "$name" -c 'import ensurepip' 2>/dev/null; then
      command -v "$name" && return
    fi
  done
  python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find 3.12
}

install_project() {
  local bucket=${1-} python minor
  python=$(find_python)
  "$python" -m venv "$SOURCE/.venv"
  minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
  "$SOURCE/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$SOURCE/requirements-lock-3.$minor.txt"
  # The lock names the version of JAX; the extra adds libtpu to it.
  "$SOURCE/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$SOURCE/requirements-lock-3.$minor.txt" -e "${SOURCE}[tpu]"
  [[ ! $bucket ]] || mount_bucket "$bucket"
  "$SOURCE/.venv/bin/bigssl" --version
}

mount_bucket() {
  local bucket=$1 key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  if ! command -v gcsfuse >/dev/null; then
    # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    printf 'deb [signed-by=%s] %s gcsfuse-%s main\n' "$key" "$packages" "$(lsb_release -cs)" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
  fi
  mountpoint -q "/mnt/$bucket" && return
  sudo mkdir -p "/mnt/$bucket"
  sudo chown "$(id -u):$(id -g)" "/mnt/$bucket"
  gcsfuse --implicit-dirs "$bucket" "/mnt/$bucket"
}

boot() { cat /proc/sys/kernel/random/boot_id; }

# The process is there, and is ours: after a restart of the machine its number may be another's.
is_running() {
  local pid
  [[ -f $RUN/pid && $(<"$RUN/boot") == "$(boot)" ]] && pid=$(<"$RUN/pid") && kill -0 "$pid" 2>/dev/null
}

start() {
  [[ $# -gt 0 ]] || { echo 'worker.sh start: no command' >&2 && exit 2; }
  ! is_running || { echo 'worker.sh: a run is going on here already' >&2 && exit 2; }
  mkdir -p "$RUN"
  rm -f "$RUN/pid" "$RUN/ended"
  setsid -f "$SOURCE/launch/worker.sh" hold "$@" </dev/null >>"$RUN/log" 2>&1
  # Once this returns, `status` knows of the run.
  until [[ -f $RUN/pid || -f $RUN/ended ]]; do sleep 0.1; done
}

# Runs the command and keeps its exit code; the end of a connection does not concern it.
hold() {
  local pid code=0
  trap '' HUP
  cd -- "$SOURCE"
  PATH=$SOURCE/.venv/bin:$PATH
  printf '%(%F %T)T starting: %s\n' -1 "$*"
  "$@" &
  pid=$!
  boot >"$RUN/boot"
  printf '%s\n' "$pid" >"$RUN/pid.new"
  mv "$RUN/pid.new" "$RUN/pid"
  wait "$pid" || code=$?
  printf '%(%F %T)T ended with exit code %d\n' -1 "$code"
  printf '%s\n' "$code" >"$RUN/ended.new"
  mv "$RUN/ended.new" "$RUN/ended"
}

status() {
  if [[ -f $RUN/ended ]]; then
    printf 'ended %s\n' "$(<"$RUN/ended")"
  elif is_running; then
    echo running
  elif [[ -f $RUN/pid ]]; then
    echo 'ended 137' # it and its keeper are gone: the machine was restarted
  else
    echo 'never started'
  fi
}

logs() {
  [[ -f $RUN/log ]] || { echo 'worker.sh: nothing was started here' >&2 && exit 2; }
  if is_running; then
    tail -n 200 -F --pid="$(<"$RUN/pid")" "$RUN/log"
  else
    tail -n 200 "$RUN/log"
  fi
}

stop() {
  local deadline=$((SECONDS + ${1:-600}))
  if is_running; then
    kill -s TERM "$(<"$RUN/pid")"
    while is_running && [[ $SECONDS -lt $deadline ]]; do sleep 0.2; done
    # The keeper writes the exit code a moment after the process has gone.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      [[ ! -f $RUN/ended ]] || break
      sleep 0.1
    done
  fi
  status
}

verb=${1-}
[[ $# -eq 0 ]] || shift
case $verb in
  install) install_project "$@" ;;
  start) start "$@" ;;
  hold) hold "$@" ;;
  status) status ;;
  logs) logs ;;
  stop) stop "$@" ;;
  *) sed -n '2,/^$/{/^#/!d;s/^# \{0,1\}//;p;}' "$0" && exit 2 ;;
esac
