#!/usr/bin/env bash
# One machine: makes .venv and installs the project into it once, then runs a command.
#
#   launch/local.sh COMMAND [flags]      python -m videomae_jax COMMAND [flags]
#   launch/local.sh --processes=N COMMAND [flags]    N processes as N hosts, on CPU: a rehearsal of a pod
#   launch/local.sh test [flags]         the tests, with the tools of the [dev] extra
#
# PYTHON names the interpreter (3.11 to 3.13), EXTRAS more extras, such as cuda or viz.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  [[ -n "${PYTHON:-}" ]] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "launch/local.sh: ${candidates[*]}: no Python 3.11, 3.12 or 3.13: install one, or name it with PYTHON=..." >&2
  exit 2
}

# install EXTRAS: idempotent; runs again when setup.py or the extras change.
install() {
  local extras="$1" stamp="$venv/.installed${1:+-$1}" wanted
  wanted="$(cksum <"$root/setup.py")"
  [[ -x "$venv/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]] && return
  if ! compgen -G "$venv/.installed*" >/dev/null; then  # none, or one that was interrupted
    local python
    python="$(find_python)"
    echo "launch/local.sh: making $venv with $("$python" --version)"
    if command -v uv >/dev/null; then uv venv --quiet --python "$python" "$venv"; else "$python" -m venv "$venv"; fi
  fi
  echo "launch/local.sh: installing videomae_jax${extras:+[$extras]} into $venv (about a minute, once)"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" -e "$root${extras:+[$extras]}"
  else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extras:+[$extras]}"
  fi
  echo "$wanted" >"$stamp"
}

# Huge pages for large buffers: a CPU step takes a quarter less time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

if [[ "${1:-}" == test ]]; then
  shift
  install "dev${EXTRAS:+,$EXTRAS}"
  cd "$root"
  exec "$venv/bin/python" -m pytest -q -n auto "$@"
fi
processes=1
if [[ "${1:-}" == --processes=* ]]; then
  processes="${1#*=}"
  shift
  if [[ ! "$processes" =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/local.sh: --processes=$processes is no number of processes: use 1 or more" >&2
    exit 2
  fi
fi
# Digits and plots of `study`.
[[ "${1:-}" == study ]] && EXTRAS="${EXTRAS:+$EXTRAS,}study"
# The compilers of `plan`: without their devices they take a few hundred MB, those of GPUs some GB.
if [[ "${1:-}" == plan ]]; then
  EXTRAS="${EXTRAS:+$EXTRAS,}plan"
  [[ " $* " =~ --topology[=\ ](a100|h100|h200|b200): ]] && EXTRAS+=",cuda"
fi
install "${EXTRAS:-}"
if ((processes > 1)); then
  # One process drives all GPUs of a machine; several are for trying out what several hosts do.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
  port="$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
  pids=()
  for ((host = 0; host < processes; host++)); do
    "$venv/bin/python" -m videomae_jax "$@" --hosts="$host/$processes@localhost:$port" &
    pids+=($!)
  done
  # Bash starts what runs in the background deaf to Ctrl-C.
  trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
  status=0
  for pid in "${pids[@]}"; do
    of_one=0
    wait "$pid" || of_one=$?
    # A signal ends the wait, not the process.
    while kill -0 "$pid" 2>/dev/null; do
      of_one=0
      wait "$pid" || of_one=$?
    done
    ((status)) || status=$of_one
  done
  exit "$status"
fi
exec "$venv/bin/python" -m videomae_jax "$@"
