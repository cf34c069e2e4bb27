#!/usr/bin/env bash
# One node's part of a job: a torchrun agent, which starts the node's ranks. train.sbatch starts it once on each node:
#   srun ... bash slurm/node.sh PYTHON HOST:PORT ATTEMPT LOG configs/credit_risk.yaml [key=value ...]
# LOG gets a copy of what is said on this node; %N in it stands for the node's name.
set -uo pipefail

python=$1 rendezvous=$2 attempt=$3 log=${4//%N/$SLURMD_NODENAME}
shift 4

ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
((ranks > 0)) || ranks=1
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
    export OMP_NUM_THREADS=$((cpus > ranks ? cpus / ranks : 1))
fi
# Without this, USR1 and USR2 kill the agent and leave its ranks behind. A variable, because an older torchrun refuses
# an option that it does not know.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2

# The copier outlives every signal: a rank must not die of a broken pipe while it saves.
exec 3> >(trap '' HUP INT TERM USR1 USR2 && exec tee -a -- "$log")
copier=$!

# Static: node k of the job is node k of the run, so rank 0 is beside the batch script and sees its files at once.
"$python" -m torch.distributed.run \
    --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks" \
    --rdzv-backend=static --rdzv-endpoint="$rendezvous" --rdzv-id="$attempt" \
    launch/train.py "$@" >&3 2>&1 3>&- &
agent=$!
exec 3>&-

signals=0
for name in TERM INT USR1 USR2; do
    # shellcheck disable=SC2064  # the name of now is meant
    trap "signals=\$((signals + 1)); kill -s $name $agent 2>/dev/null" "$name"
done
# A signal ends `wait` early, with a code that is not the agent's: then wait again.
until
    seen=$signals
    wait "$agent"
    code=$?
    ((signals == seen))
do :; done
wait "$copier" # or Slurm would end it together with the last words
exit "$code"
