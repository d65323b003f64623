#!/usr/bin/env bash
#SBATCH --job-name=minimax-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --kill-on-bad-exit=1
#
# Two hosts with eight GPUs each, a process a GPU:
#
#   sbatch scripts/launch_slurm.sh generate --model DIR --tp 8 --ep 16 --prompt "..."
#   sbatch scripts/launch_slurm.sh bench --model DIR --tp 8 --ep 16 --attention-dp 2 --hosts 2 --out results
#   sbatch --nodes=1 scripts/launch_slurm.sh bench --model DIR --tp 8 --ep 8 --out results
#
# Arguments are those of `minimax-jax`; --distributed slurm is added. Submit from the repository's root, where .venv is
# (bash scripts/run.sh makes it), on a file system that all hosts have.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "launch_slurm.sh: error: not in a SLURM job: start it with sbatch" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
# JAX numbers a process's GPU by its place on the host, so every process must see all of the host's
exec srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" .venv/bin/minimax-jax "$@" --distributed slurm
