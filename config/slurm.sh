#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm: sbatch config/slurm.sh config/lrc_4b.py --parallel=fsdp --replicas=2
#
# Slurm sends SIGTERM two minutes before the time limit, or when another job takes the nodes. The run then saves
# and ends, the job is queued again, and --resume=True goes on from the last checkpoint.
#SBATCH --job-name=lrc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without a longer --shutdown-timeout torchrun kills a rank 30 s after SIGTERM, in the middle of its save.
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --shutdown-timeout=600 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first_node:29500" \
    train.py "$@" --resume=True &
launcher=$!

stop() {
    scancel --signal=TERM "$SLURM_JOB_ID.0" || true # the step that srun started, on all nodes
    wait "$launcher" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM
wait "$launcher"
