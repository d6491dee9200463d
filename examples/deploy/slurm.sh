#!/bin/bash
# One video over the GPUs of two nodes: sbatch examples/deploy/slurm.sh ref.mp4 "a red fox in fresh snow" fox.mp4
# The same command again continues a run that the time limit has ended; paths are on a shared file system.
#SBATCH --job-name=fastvmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m diffsynth transfer "$1" --prompt "$2" -o "$3" --model "${MODEL:-14b}" --checkpoint-minutes 1
