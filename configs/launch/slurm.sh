#!/usr/bin/env bash
# Eight hosts of eight H100s under Slurm, a process a GPU: sbatch configs/launch/slurm.sh CONFIG [options of train]
# JAX finds its place in what srun sets. Two minutes before the time is up, and where the job is preempted, Slurm sends
# SIGTERM: the run saves its last step and ends; the same command goes on from there.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
srun --label --kill-on-bad-exit=1 shardlab train "$@" \
  --target gpu:h100:8x8 --out runs/slurm --checkpoint-every 500 --resume --distributed
