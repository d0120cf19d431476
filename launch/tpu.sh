#!/usr/bin/env bash
# gvu_jax on a slice of Cloud TPUs. README.md beside this file tells the whole way.
#
#   tpu.sh create           ask for the slice: a queued resource, filled as soon as there is room
#   tpu.sh setup            on every worker: mount the bucket at /gcs, install gvu_jax from this checkout
#   tpu.sh run ARGS...      on every worker: python -m gvu_jax.train --hosts=auto ARGS..., in the background
#   tpu.sh status           the state of the slice, and of the run on each worker
#   tpu.sh watch [WORKER]   follow what worker 0 (or another) prints
#   tpu.sh stop             have the run save its state and end; the slice stays, and is billed
#   tpu.sh loop ARGS...     all of it until the run has finished, over preemptions, and then delete
#   tpu.sh fetch RUN DIR    copy report, metrics and pictures of the bucket's folder RUN to DIR
#   tpu.sh delete           give the slice back: the bill stops
#
# Environment: ZONE, TYPE (accelerator type) and BUCKET; SPOT=1 for a spot slice; TPU (name of the
# slice, gvu); RUNTIME (image, chosen by TYPE); INTERVAL (seconds between two looks of the loop, 60); ATTEMPTS (what the
# loop may create, start or find unanswered before it gives up, 50); DRY_RUN=1 prints the commands and runs none.
set -euo pipefail

TPU=${TPU:-gvu} INTERVAL=${INTERVAL:-60} ATTEMPTS=${ATTEMPTS:-50} DRY_RUN=${DRY_RUN:-}
ZONE=${ZONE:-} TYPE=${TYPE:-} BUCKET=${BUCKET:-} RUNTIME=${RUNTIME:-}
BUCKET=${BUCKET#gs://}         # name or address
[[ ${SPOT:-0} != 0 ]] || SPOT=
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1                      # where a dry run prints, also from inside $(...)

die() { echo "error: $*" >&2; exit 1; }
say() { echo "$(date '+%F %T')  $*"; }

# Every command goes through here: run, or printed such that it can be pasted.
step() {
  if [[ $DRY_RUN ]]; then printf '%s%s\n' "$1" "$(printf ' %q' "${@:2}")" >&3; else "$@"; fi
}

on() {                         # on WORKER COMMAND: a shell command on one worker, or on all of them at once
  step gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

# ---- the slice ---------------------------------------------------------------------------------------------------

create() {
  step gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

delete() {                     # --force: with its node; it returns when both are gone
  step gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
}

# The state of the slice: nothing where there is none; that of the queued resource (WAITING_FOR_RESOURCES, PROVISIONING,
# SUSPENDED, FAILED, ...) and, once it is ACTIVE, that of its node (CREATING, READY, PREEMPTED, ...; GONE if deleted).
state() {
  local found this=(--zone="$ZONE" --filter="name~/$TPU\$")
  found=$(step gcloud compute tpus queued-resources list "${this[@]}" --format='value(state.state)') || return
  if [[ $found == ACTIVE || $DRY_RUN ]]; then
    found=$(step gcloud compute tpus tpu-vm list "${this[@]}" --format='value(state)') || return
    found=${found:-GONE}
  fi
  echo "$found"
}

# ---- the workers -------------------------------------------------------------------------------------------------

setup() {                      # the loop calls it as a condition, where set -e sleeps: hence the &&
  local archive=${TMPDIR:-/tmp}/gvu_jax.tar.gz hierarchical
  hierarchical=$(step gcloud storage buckets describe "gs://$BUCKET" --raw \
    --format='value(hierarchicalNamespace.enabled)') || return
  [[ $hierarchical == [Tt]rue || $DRY_RUN ]] || die "gs://$BUCKET has no hierarchical namespace, without which a" \
    "checkpoint cannot be renamed in one piece: make a bucket as launch/README.md says"
  step tar --create --gzip --file="$archive" --directory="$here/.." --exclude=__pycache__ \
    setup.py configs gvu_jax launch &&
    step gcloud compute tpus tpu-vm scp "$archive" "$TPU:gvu_jax.tar.gz" --zone="$ZONE" --worker=all &&
    on all "mkdir -p gvu_jax && tar -xzf gvu_jax.tar.gz -C gvu_jax && bash gvu_jax/launch/worker.sh setup $BUCKET"
}

run() {
  on all "bash gvu_jax/launch/worker.sh run$(printf ' %q' "$@")"
}

report() {                     # a line of each worker: "gvu_jax HOST: new", "...: running" or "...: exit STATUS"
  local script=gvu_jax/launch/worker.sh
  on all "if [ -f $script ]; then bash $script report; else echo \"gvu_jax \$(hostname): new\"; fi"
}

status() {
  local found
  found=$(state)
  [[ $DRY_RUN ]] || echo "$TPU: ${found:-no such slice}"
  if [[ $found == READY || $DRY_RUN ]]; then report; fi
}

watch() {
  on "${1:-0}" "sudo journalctl --unit=gvu_jax --output=cat --lines=100 --follow"
}

stop() {                       # a signal to every worker, as a preemption gives: what is unsaved is saved first
  on all "sudo systemctl kill --signal=TERM gvu_jax"
}

fetch() {
  step mkdir -p "$2"
  step gcloud storage rsync "gs://$BUCKET/${1#/gcs/}" "$2" --recursive --exclude='(base|checkpoints)/'
}

# ---- the loop ----------------------------------------------------------------------------------------------------

# Each turn looks at the world and does the one thing that it asks for. The loop keeps in mind only how often it has
# tried and whether it has seen its run going: ended and given again, it goes on from wherever the slice is.
loop() {
  local found attempts=0 ours=
  if [[ $DRY_RUN ]]; then      # nothing answers: the commands of a run that nothing disturbs
    state >/dev/null
    create; setup; run "$@"; report; delete
    return
  fi
  found=$(state)               # a wrong zone or a missing login ends it here, not an hour later
  while true; do
    case $found in
      "")
        attempt "no slice: asking for one"
        create || ((attempts > 1)) ;;            # what is refused at first is a mistake; later on, try again
      READY) tend "$@" ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED | GONE) say "$found: deleting what is left"; delete || again ;;
      *) say "$found: waiting" ;;
    esac
    sleep "$INTERVAL"
    found=$(state) || found="no answer"
  done
}

# One turn at a slice that is up. A run ends with 0, finished; 75, stopped by a signal after saving; else by a mistake,
# which another start would only repeat.
tend() {
  local lines
  lines=$(report | grep '^gvu_jax ') || lines="no answer"
  [[ $ours || $lines == "no answer" || $lines == *": running"* ]] || lines=": new"    # what ended before our time
  case $lines in
    "no answer") attempt "the workers do not answer" ;;
    *": running"*) ours=yes ;; # also while only some are: the others are about to end, or to be ended
    *": new"*)
      attempt "setting up and starting the run"
      if setup && run "$@"; then ours=yes; else again; fi ;;
    *": exit 75"*)
      attempt "stopped by a signal: resuming"
      run "$@" || again ;;
    *)
      if lines=$(grep -v ': exit 0$' <<<"$lines"); then
        on 0 "sudo journalctl --unit=gvu_jax --output=cat --lines=30" || true        # worth a try; the error follows
        die "the run failed (${lines//$'\n'/, }); the slice is still billed: give the loop again with the" \
          "mistake mended, or launch/tpu.sh delete"
      fi
      say "finished"
      delete
      exit ;;
  esac
}

again() { say "that failed; looking again"; }

attempt() {
  ((++attempts <= ATTEMPTS)) || die "gave up after $ATTEMPTS attempts; what may be left of the slice is billed" \
    "until launch/tpu.sh delete"
  say "$*"
}

# ---- the command line --------------------------------------------------------------------------------------------

need() {
  local name
  for name in "$@"; do
    [[ ${!name} ]] || die "$name is not set: export ZONE (us-west4-a), TYPE (v5litepod-64) and BUCKET as" \
      "launch/README.md says"
  done
}

need_runtime() {
  case $TYPE in
    v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
    *) [[ $RUNTIME ]] || die "TYPE=$TYPE is none of v5litepod-N, v5p-N, v6e-N: set RUNTIME too, or mend TYPE" ;;
  esac
}

need_workdir() {
  [[ " $* " == *" --workdir"[=\ ]"/gcs/"* ]] || die "give the arguments of gvu_jax.train, with --workdir=/gcs/FOLDER:" \
    "what lies elsewhere is lost with the slice"
}

case ${1:-} in
  create) need ZONE TYPE; need_runtime ;;
  setup) need ZONE BUCKET ;;
  run) need ZONE; need_workdir "${@:2}" ;;
  status | watch | stop | delete) need ZONE ;;
  loop) need ZONE TYPE BUCKET; need_runtime; need_workdir "${@:2}" ;;
  fetch) need BUCKET; [[ $# == 3 ]] || die "give the run and a folder for it: tpu.sh fetch runs/xomni results" ;;
  *) die "unknown subcommand '${1:-}': create, setup, run, status, watch, stop, loop, fetch or delete" ;;
esac
[[ $DRY_RUN ]] || command -v gcloud >/dev/null || die "gcloud is missing: install the Google Cloud CLI from" \
  "https://cloud.google.com/sdk/docs/install"
"$@"
