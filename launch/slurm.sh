#!/usr/bin/env bash
# A SLURM cluster of GPUs: one process per GPU, on any number of nodes; goes back into the queue when its time is
# over or it is preempted, and resumes.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --time=24:00:00 launch/slurm.sh \
#       train --config=configs/pretrain.py:size=base,data=k400 --config.data.path=/data/k400 --workdir=/shared/runs/k400
#
# COMMAND is train, evaluate or doctor; of the others one process does. Submit from the project's folder, on a file system that all nodes share; so must the work folder be. Run
# `EXTRAS=cuda launch/local.sh help` there once before, so that .venv is installed.
#SBATCH --job-name=videomae_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the end every process gets SIGTERM: it saves a checkpoint and ends.
#SBATCH --signal=TERM@120
set -euo pipefail

if (($# == 0)); then
  echo "launch/slurm.sh: use sbatch [options] launch/slurm.sh COMMAND [flags]; see the head of the script" >&2
  exit 2
fi
root="${SLURM_SUBMIT_DIR:?launch/slurm.sh is for sbatch}"
if [[ ! -x "$root/.venv/bin/python" ]]; then
  echo "launch/slurm.sh: no $root/.venv: run EXTRAS=cuda launch/local.sh help in the project's folder first" >&2
  exit 2
fi
workdir="" before=""
for word in "$@"; do
  [[ "$word" == --workdir=* ]] && workdir="${word#*=}"
  [[ "$before" == --workdir ]] && workdir="$word"
  before="$word"
done

cd "$root"
# Newer versions of srun no longer take this from sbatch.
[[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# Without --kill-on-bad-exit the others would wait for a process that failed.
srun --kill-on-bad-exit=1 .venv/bin/python -m videomae_jax "$@" --hosts=slurm

read='import sys; from videomae_jax import storage; print((storage.at(sys.argv[1]) / "summary.json").read_text())'
summary=""
if [[ "$1" == train && -n "$workdir" ]]; then
  summary="$(.venv/bin/python -c "$read" "$workdir" || true)"  # which may be gs://BUCKET/FOLDER
fi
if [[ "$summary" == *'"interrupted": true'* ]]; then
  echo "launch/slurm.sh: interrupted, back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
