#!/usr/bin/env bash
# A Cloud TPU slice: makes it or takes the one that is there, installs these sources on every worker, runs one
# command on all of them, brings their logs back, and begins again when the slice is preempted.
#
#   launch/tpu.sh NAME ZONE TYPE [--dry-run] COMMAND [flags]
#   launch/tpu.sh pod us-west4-a v5litepod-64 train --config=configs/pretrain.py:size=base,data=k400 \
#       --config.data.path=gs://BUCKET/k400 --workdir=/mnt/shared/runs/k400
#
# COMMAND is train, evaluate or doctor. --dry-run prints every command instead of running it. The work folder must
# be one that all workers share. Ctrl-C ends the connection, not what runs on the slice.
# VERSION names the runtime image, SPOT=1 asks for spot capacity, RESTARTS (100) limits new beginnings, LOGS
# (logs/NAME) is where logs go. The slice stays when the command has ended:
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if (($# < 4)); then
  echo "launch/tpu.sh: use NAME ZONE TYPE [--dry-run] COMMAND [flags]; see the head of the script" >&2
  exit 2
fi
name="$1" zone="$2" type="$3"
shift 3
dry_run=""
if [[ "$1" == --dry-run ]]; then
  dry_run=1
  shift
fi
case "$type" in
  v5litepod*) default_version=v2-alpha-tpuv5-lite ;;
  v5p*) default_version=v2-alpha-tpuv5 ;;
  v6e*) default_version=v2-alpha-tpuv6e ;;
  *) default_version=tpu-ubuntu2204-base ;;
esac
version="${VERSION:-$default_version}"
restarts="${RESTARTS:-100}"
logs="${LOGS:-logs/$name}"

run() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() { # tpu VERB [flags]: about this slice
  run gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"
}

state() { # READY, PREEMPTED, ...; nothing where there is no such slice
  gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true
}

on_all() {
  tpu ssh --worker=all --command="$1"
}

# The images may have an older Python only; 3.11 is in Ubuntu's own archive.
install='mkdir -p videomae_jax && tar -xzf videomae_jax.tar.gz -C videomae_jax'
install+=' && { command -v uv || command -v python3.11 || command -v python3.12 || command -v python3.13'
install+=' || { sudo apt-get -q update && sudo apt-get -qy install python3.11 python3.11-venv; }; } >/dev/null'
install+=' && EXTRAS=tpu,gcs videomae_jax/launch/local.sh help >/dev/null'

prepare() { # a slice that is ready, with these sources installed
  # Called where a failure does not end the script: each step is checked.
  local now=""
  [[ -n "$dry_run" ]] || now="$(state)"
  case "$now" in
    READY) ;;
    PREEMPTED | TERMINATED) tpu delete --quiet || return ;;
    "") ;;
    *)
      echo "launch/tpu.sh: the slice $name is $now: wait, or delete it, then run the same command" >&2
      return 1
      ;;
  esac
  if [[ "$now" != READY ]]; then
    tpu create --accelerator-type="$type" --version="$version" ${SPOT:+--spot} || return
  fi
  run tar -czf "$archive" --exclude=.venv --exclude=.git --exclude=runs --exclude=logs -C "$root" . || return
  run gcloud compute tpus tpu-vm scp "$archive" "$name:videomae_jax.tar.gz" --zone="$zone" --worker=all || return
  on_all "$install"
}

collect() { # each worker's log, as far as it can be reached
  local workers=1 worker
  [[ -n "$dry_run" ]] || workers="$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
    --format='value(networkEndpoints[].ipAddress)' 2>/dev/null | grep -oE '[0-9.]+' | wc -l || true)"
  for ((worker = 0; worker < workers; worker++)); do
    run gcloud compute tpus tpu-vm scp "$name:videomae_jax/host.log" "$logs/host$worker.log" \
      --zone="$zone" --worker="$worker" || true
  done
}

[[ -n "$dry_run" ]] || mkdir -p "$logs"
archive="${TMPDIR:-/tmp}/videomae_jax.$$.tar.gz"
trap 'rm -f "$archive"' EXIT
command="$(printf '%q ' "$@")"
status=1
for ((attempt = 0; attempt <= restarts; attempt++)); do
  status=0
  prepare || status=$?
  ((status == 0 || attempt > 0)) || exit "$status"  # nothing was begun that could be begun again
  if ((status == 0)); then
    # The flag of the hosts comes last; it is the only one that this script adds.
    on_all "cd videomae_jax && set -o pipefail && EXTRAS=tpu,gcs launch/local.sh ${command}--hosts=tpu 2>&1 | tee -a host.log" || status=$?
    rm -f "$logs/host0.log"  # of an attempt before
    collect
  fi
  [[ -n "$dry_run" ]] && exit 0
  now="$(state)"
  # A slice about to be taken away gets SIGTERM first: the command saves and ends with status 0. It may be gone
  # before its log is here.
  is_over=1
  tail -n 5 "$logs/host0.log" 2>/dev/null | grep -q 'SIGTERM: saving' && is_over=""
  [[ -e "$logs/host0.log" || "$now" == READY ]] || is_over=""
  ((status == 0)) && [[ -n "$is_over" ]] && exit 0
  if ((status)) && [[ "$now" == READY ]]; then
    echo "launch/tpu.sh: the command failed with status $status and the slice is there: see $logs" >&2
    exit "$status"
  fi
  echo "launch/tpu.sh: the slice is ${now:-gone}, beginning again ($((attempt + 1)) of $restarts)" >&2
  sleep "${PAUSE:-30}"
done
exit "$status"
