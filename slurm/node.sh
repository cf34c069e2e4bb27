#!/usr/bin/env bash
# One node's part of a job: a torchrun agent, which starts the node's ranks. train.sbatch starts it once on each node:
#   srun ... bash slurm/node.sh RUN_FOLDER HOST:PORT LOG configs/credit_risk.yaml [key=value ...]
# LOG gets a copy of what is said on this node; %N in it stands for the node's name.
set -uo pipefail

# The copier outlives every signal: a rank must not die of a broken pipe while it saves.
exec > >(trap '' HUP INT TERM USR1 USR2 && exec tee -a -- "${3//%N/$SLURMD_NODENAME}") 2>&1
copier=$!

. slurm/common.sh
who+=", $SLURMD_NODENAME"
run_folder=$1 rendezvous=$2
shift 3

ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
((ranks > 0)) || ranks=1
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
    export OMP_NUM_THREADS=$((cpus > ranks ? cpus / ranks : 1))
fi
# Some clusters signal every process of a job. Without this, USR1 and USR2 then kill the agent and leave its ranks
# behind. It is a variable because an older torchrun refuses an option that it does not know.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2

# Static: node k of the job is node k of the run. Rank 0 is then beside the batch script, and sees its files at once.
"$python" -m torch.distributed.run \
    --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks" \
    --rdzv-backend=static --rdzv-endpoint="$rendezvous" --rdzv-id="$attempt" \
    launch/train.py "$@" &
wait_for $!

# Closed and waited for, or Slurm would end the copier together with the last words.
exec >&- 2>&-
wait "$copier"
exit "$code"
