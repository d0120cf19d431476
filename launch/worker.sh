#!/usr/bin/env bash
# What tpu.sh has every worker (host) of a slice do; nobody needs to call it by hand.
#
#   worker.sh setup BUCKET   mount the bucket at /gcs; install gvu_jax and its Python in .venv beside it
#   worker.sh run ARGS...    start python -m gvu_jax.train --hosts=auto ARGS... as the service gvu_jax
#   worker.sh report         print "gvu_jax HOST: " and new, running, or exit STATUS
#
# Bucket and run are transient services of systemd: they outlive the ssh session, and when the machine is shut down (a
# preemption, a maintenance), the run gets its SIGTERM first, and the bucket is there until it has saved.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "error: $(hostname): $*" >&2; exit 1; }

setup() {
  [[ $(report) != *running ]] || die "the run is still going"
  if ! mountpoint --quiet /gcs; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo mkdir -p /gcs
    # No cached metadata: on TPU machines gcsfuse would keep it for ever, and no worker would see what others write.
    sudo systemd-run --unit=gcs --collect --service-type=forking --property=After=network-online.target \
      gcsfuse -o allow_other --uid="$(id -u)" --gid="$(id -g)" --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "$1" /gcs
  fi
  python3 -m pip install --quiet --user uv              # the image's own Python may be too old for gvu_jax
  ~/.local/bin/uv venv --quiet --clear --python=3.11 .venv
  ~/.local/bin/uv pip install --quiet --python=.venv '.[tpu]'
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install gcsfuse        # a new machine may be busy updating itself
}

run() {
  case $(report) in
    *running) die "the run is already going" ;;
    *"exit 0") sudo systemctl stop gvu_jax ;;           # forget how the last one ended
    *exit*) sudo systemctl reset-failed gvu_jax ;;
  esac
  # libtpu pins memory; systemd reads $ in arguments, and $$ as a dollar.
  sudo systemd-run --unit=gvu_jax --remain-after-exit --uid="$(id -u)" --gid="$(id -g)" --working-directory="$PWD" \
    --property=After=gcs.service --property=TimeoutStopSec=10min --property=LimitMEMLOCK=infinity \
    --setenv=PYTHONUNBUFFERED=1 "$PWD/.venv/bin/python" -m gvu_jax.train --hosts=auto "${@//\$/\$\$}"
}

report() {
  local how
  case $(property LoadState)/$(property SubState) in
    not-found/*) how=new ;;
    */exited | */failed)
      how=$(property ExecMainStatus)
      [[ $(property ExecMainCode) == 1 ]] || how=$((128 + how))       # 1: it exited; else a signal ended it
      how="exit $how" ;;
    *) how=running ;;
  esac
  echo "gvu_jax $(hostname): $how"
}

property() { systemctl show --value --property="$1" gvu_jax; }

"$@"
