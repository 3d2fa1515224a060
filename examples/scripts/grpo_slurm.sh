#!/usr/bin/env bash
#SBATCH --job-name=megavila-grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# One torchrun a node: sbatch examples/scripts/grpo_slurm.sh model.path=DIR data.train=[rl.jsonl] …
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
  --rdzv-id "$SLURM_JOB_ID" pretrain_grpo.py --config examples/configs/longvila_grpo.yaml "$@"
