#!/usr/bin/env bash
# Runs a command on TPU slices of a Kubernetes cluster on Google Cloud, as a JobSet.
#
#     launch/gke.sh run --name pod --topology v5e-256 --image REGISTRY/bigssl:1 --bucket B -- \
#         bigssl run --config experiments/X.py --workdir /mnt/B/runs/x
#
#     run      create the JobSet: one job a slice, one pod a host; Kubernetes restarts it
#     status   of the JobSet and its pods          logs     follow the log of a worker
#     stop     let the run save, give the TPU back resume   continue after stop
#     delete   the JobSet; only what was created here
#
# Options:
#   --name N               what to call it
#   --topology T           v5e-256, v4-512, 2xv5e-256, ... (run)
#   --image I              a container image with bigssl in it, see launch/Dockerfile (run)
#   --bucket B             mount this bucket at /mnt/B in every pod (run)
#   --namespace S --context C   default: those of kubectl (run)
#   --service-account A    of Kubernetes, with access to the bucket (run)
#   --spot                 on spot nodes (run)
#   --reservation R        on nodes of this reservation (run)
#   --env KEY=VALUE        for the command; repeatable (run)
#   --max-restarts N       how often Kubernetes restarts all of it (default 50; run)
#   --grace-seconds S      between SIGTERM and SIGKILL (default 600; run)
#   --worker W --slice I   whose log (logs; default 0 and 0)
#   --xpk                  through xpk instead, with --cluster C and --zone Z (run)
#   --dry-run              print the manifest and the commands, and stop

source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

TOPOLOGY=
IMAGE=
BUCKET=
NAMESPACE=
CONTEXT=
SERVICE_ACCOUNT=
SPOT=
RESERVATION=
ENVIRONMENT=()
MAX_RESTARTS=50
GRACE=600
WORKER=0
SLICE=0
XPK=
CLUSTER=
ZONE=

options() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --name) NAME=$(option_value "$@"); shift ;;
      --topology) TOPOLOGY=$(option_value "$@"); shift ;;
      --image) IMAGE=$(option_value "$@"); shift ;;
      --bucket) BUCKET=$(option_value "$@"); shift ;;
      --namespace) NAMESPACE=$(option_value "$@"); shift ;;
      --context) CONTEXT=$(option_value "$@"); shift ;;
      --service-account) SERVICE_ACCOUNT=$(option_value "$@"); shift ;;
      --spot) SPOT=1 ;;
      --reservation) RESERVATION=$(option_value "$@"); shift ;;
      --env) ENVIRONMENT+=("$(option_value "$@")"); shift ;;
      --max-restarts) MAX_RESTARTS=$(option_value "$@"); shift ;;
      --grace-seconds) GRACE=$(option_value "$@"); shift ;;
      --worker) WORKER=$(option_value "$@"); shift ;;
      --slice) SLICE=$(option_value "$@"); shift ;;
      --xpk) XPK=1 ;;
      --cluster) CLUSTER=$(option_value "$@"); shift ;;
      --zone) ZONE=$(option_value "$@"); shift ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage; exit ;;
      --) shift; COMMAND=("$@"); break ;;
      *) die "unknown option $(quoted "$1"); the command to run stands after '--' (see --help)" ;;
    esac
    shift
  done
  check_name
  check_count --max-restarts "$MAX_RESTARTS" 0
  check_count --grace-seconds "$GRACE" 1
  check_count --worker "$WORKER" 0
  check_count --slice "$SLICE" 0
  need kubectl 'see https://kubernetes.io/docs/tasks/tools'
}

check_run() {
  local pair
  accelerator "$TOPOLOGY"
  [[ $GKE_ACCELERATOR != - ]] || die "--topology $TOPOLOGY is not offered here on GKE: use launch/tpu_vm.sh"
  [[ $IMAGE ]] || die '--image is missing: a container image with bigssl in it, see launch/Dockerfile'
  check_word --image "$IMAGE"
  [[ ! $NAMESPACE ]] || check_word --namespace "$NAMESPACE"
  [[ ! $CONTEXT ]] || check_word --context "$CONTEXT"
  [[ ! $SERVICE_ACCOUNT ]] || check_word --service-account "$SERVICE_ACCOUNT"
  [[ ! $RESERVATION ]] || check_word --reservation "$RESERVATION"
  [[ ! $SPOT || ! $RESERVATION ]] || die '--spot and --reservation exclude each other'
  check_bucket
  for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env $(quoted "$pair"): write KEY=VALUE"
  done
  check_command
  check_shared_workdir
  for pair in "${COMMAND[@]}" ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    json "$pair" >/dev/null # here, where a refusal ends the script
  done
  if [[ $XPK ]]; then
    need xpk "'pip install xpk', or leave --xpk out"
    check_zone
    [[ $CLUSTER ]] || die '--cluster is missing; xpk wants the name of the cluster'
    check_word --cluster "$CLUSTER"
    [[ ! $BUCKET$SERVICE_ACCOUNT ]] ||
      die "--bucket and --service-account are not for --xpk; 'xpk storage' attaches buckets"
  fi
}

# ---------------------------------------------------------------------------------------------
# the manifest

# A text as a JSON string, which is a YAML string too.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\r'/\\r}
  text=${text//$'\t'/\\t}
  [[ ! $text =~ [[:cntrl:]] ]] || die "$(quoted "$1"): a control character cannot be passed on"
  printf '"%s"' "$text"
}

# Kubernetes replaces $(VARIABLE) in commands and variables; two dollars stand for one.
# https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables
literal() { json "${1//\$/\$\$}"; }

# lines INDENT TEXT...: the texts as lines of YAML.
lines() {
  local indent=$1 line
  shift
  for line in "$@"; do printf '%*s%s\n' "$indent" '' "$line"; done
}

manifest() {
  local word pair
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
YAML
  [[ ! $NAMESPACE ]] || lines 2 "namespace: $(json "$NAMESPACE")"
  cat <<YAML
  labels:
    bigssl-launch: $MARK
  annotations:
    # One slice is one node pool: a job never straddles two.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      # Exit code $EXIT_USER_ERROR is something to mend: trying again would not help.
      - name: mend
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          completionMode: Indexed
          completions: $HOSTS
          parallelism: $HOSTS
          # A pod that ends ends the job, and so the set: all start again together.
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: bigssl
                  operator: In
                  values: [$EXIT_USER_ERROR]
          template:
            metadata:
              labels:
                bigssl-launch: $MARK
YAML
  [[ ! $BUCKET ]] || lines 14 'annotations:' '  gke-gcsfuse/volumes: "true"'
  cat <<YAML
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE
YAML
  [[ ! $SERVICE_ACCOUNT ]] || lines 14 "serviceAccountName: $(json "$SERVICE_ACCOUNT")"
  cat <<YAML
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $GKE_ACCELERATOR
                cloud.google.com/gke-tpu-topology: $GKE_TOPOLOGY
YAML
  [[ ! $RESERVATION ]] || lines 16 "cloud.google.com/reservation-name: $(json "$RESERVATION")"
  if [[ $SPOT ]]; then
    lines 16 'cloud.google.com/gke-spot: "true"'
    lines 14 'tolerations:' '  - key: cloud.google.com/gke-spot' '    operator: Equal' \
      '    value: "true"' '    effect: NoSchedule'
  fi
  cat <<YAML
              containers:
                - name: bigssl
                  image: $(json "$IMAGE")
                  command:
YAML
  for word in "${COMMAND[@]}"; do lines 20 "- $(literal "$word")"; done
  if [[ ${ENVIRONMENT[*]-} ]]; then
    lines 18 'env:'
    for pair in "${ENVIRONMENT[@]}"; do
      lines 20 "- name: ${pair%%=*}" "  value: $(literal "${pair#*=}")"
    done
  fi
  cat <<YAML
                  ports:
                    # Between the hosts of a slice, and where the processes of JAX meet.
                    - containerPort: 8471
                      protocol: TCP
                    - containerPort: 8482
                      protocol: TCP
                  resources:
                    limits:
                      google.com/tpu: $CHIPS_PER_HOST
YAML
  if [[ $BUCKET ]]; then
    lines 18 'volumeMounts:' '  - name: bucket' "    mountPath: /mnt/$BUCKET"
    lines 14 'volumes:' '  - name: bucket' '    csi:' '      driver: gcsfuse.csi.storage.gke.io' \
      '      volumeAttributes:' "        bucketName: $(json "$BUCKET")" \
      '        mountOptions: implicit-dirs'
  fi
}

# ---------------------------------------------------------------------------------------------
# verbs

# kube WORD...: the words of a kubectl command that goes to the cluster and namespace of this run.
kube() {
  words=(kubectl ${CONTEXT:+"--context=$CONTEXT"} ${NAMESPACE:+"--namespace=$NAMESPACE"} "$@")
}

# The mark on the JobSet of our name, or nothing when there is none.
jobset_mark() { # WHAT A DRY RUN SUPPOSES
  local -a words
  kube get jobset "$NAME" --ignore-not-found '--output=jsonpath={.metadata.labels.bigssl-launch}'
  ask "$1" "${words[@]}"
}

run() {
  local -a words
  local existing
  check_run
  state_free gke
  if [[ ! $CONTEXT ]]; then
    CONTEXT=$(ask CONTEXT kubectl config current-context) ||
      die "kubectl knows no cluster; 'gcloud container clusters get-credentials CLUSTER --zone ZONE'"
  fi
  kube get customresourcedefinition jobsets.jobset.x-k8s.io --output=name
  existing=$(ask yes "${words[@]}") ||
    die 'the cluster has no JobSet (or cannot be asked); see https://jobset.sigs.k8s.io/docs/installation'
  kube get jobset "$NAME" --ignore-not-found --output=name
  existing=$(ask '' "${words[@]}")
  [[ ! $existing ]] || die "a JobSet $NAME exists in this cluster, not created here; choose another --name"
  MARK=$(new_mark)
  state_begin gke
  state_set mark "$MARK"
  state_set context "$CONTEXT"
  state_set namespace "$NAMESPACE"
  state_set cluster "$CLUSTER"
  state_set zone "$ZONE"
  if [[ $XPK ]]; then
    words=(xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--zone=$ZONE"
      "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$SLICES" "--docker-image=$IMAGE"
      "--docker-name=bigssl" "--max-restarts=$MAX_RESTARTS" "--restart-on-exit-codes=1,$EXIT_STOPPED"
      "--termination-grace-period-seconds=$GRACE" ${SPOT:+--spot}
      ${RESERVATION:+"--reservation=$RESERVATION"})
    local pair
    for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do words+=("--env=$pair"); done
    pair=$(quoted "${COMMAND[@]}")
    words+=("--command=${pair//\$/\$\$}") # it becomes a command of Kubernetes, see `literal`
    create "${words[@]}"
  else
    # `create`, never `apply`: what exists is not changed.
    kube create --filename=-
    if [[ $DRY_RUN ]]; then
      printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(quoted "${words[@]}")" "$(manifest)"
    else
      manifest >"$STATE/manifest.yaml"
      create "${words[@]}" <"$STATE/manifest.yaml"
    fi
  fi
  report "created $NAME; it costs until it is done or 'gke.sh delete --name $NAME'"
}

# A creation that fails leaves nothing behind.
create() {
  step "$@" && return
  say 'that failed (what it says stands above); cleaning up'
  if check_ours; then remove; fi
  state_end
  exit 1
}

remove() {
  local -a words
  kube delete jobset "$NAME"
  [[ ! $CLUSTER ]] ||
    words=(xpk workload delete "--workload=$NAME" "--cluster=$CLUSTER" "--zone=$ZONE" --force)
  step "${words[@]}"
}

recall() {
  state_open gke
  MARK=$(state_get mark) CONTEXT=$(state_get context) NAMESPACE=$(state_get namespace)
  CLUSTER=$(state_get cluster) ZONE=$(state_get zone)
}

# Only what carries our mark is changed or deleted.  xpk puts its own label on what it creates.
check_ours() {
  local found
  if [[ $CLUSTER ]]; then
    local -a words
    kube get jobset "$NAME" --ignore-not-found '--output=jsonpath={.metadata.labels.xpk\.google\.com/workload}'
    found=$(ask "$NAME" "${words[@]}")
    [[ ! $found || $found == "$NAME" ]] || die "$NAME was not created by xpk: left alone"
  else
    found=$(jobset_mark "$MARK")
    [[ ! $found || $found == "$MARK" ]] ||
      die "the JobSet $NAME is not the one that was created here (its mark is '$found'): left alone"
  fi
  [[ $found ]]
}

on_existing() {
  local -a words
  case $1 in
    status)
      kube get jobset "$NAME" --output=wide
      step "${words[@]}"
      kube get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
      step "${words[@]}"
      ;;
    logs)
      kube logs --follow --tail=200 --container=bigssl \
        "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=$SLICE,batch.kubernetes.io/job-completion-index=$WORKER"
      step "${words[@]}"
      ;;
    stop | resume)
      check_ours || die "$NAME is gone"
      local suspend=false
      [[ $1 == resume ]] || suspend=true
      kube patch jobset "$NAME" --type=merge "--patch={\"spec\":{\"suspend\":$suspend}}"
      step "${words[@]}"
      ;;
    delete)
      if check_ours; then remove; else say "$NAME is gone already"; fi
      state_end
      ;;
  esac
}

main() {
  local verb=${1-}
  [[ $# -eq 0 ]] || shift
  case $verb in
    run | status | logs | stop | resume | delete) ;;
    -h | --help | '') usage; exit ;;
    *) die "unknown verb $(quoted "$verb"); one of run status logs stop resume delete" ;;
  esac
  options "$@"
  if [[ $verb == run ]]; then
    run
  else
    recall
    on_existing "$verb"
  fi
}

main "$@"
