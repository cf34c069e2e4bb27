#!/usr/bin/env bash
# Train, then evaluate on the test rows: jobs that wait for one another. From the repository root:
#   slurm/pipeline.sh [--nodes=N --gpus-per-node=G ...] configs/credit_risk.yaml [more.yaml ...] [key=value ...]
#
# The options go to the training job. What every job needs goes into Slurm's own variables: SBATCH_PARTITION,
# SBATCH_ACCOUNT, SBATCH_QOS. A job that is requeued keeps its number, so the next one waits for its real end.
set -euo pipefail

if [[ ! -f slurm/train.sbatch ]]; then
    echo "error: $PWD is not the repository root" >&2
    exit 2
fi
python=${DIST_TRAIN_VENV:-.venv}/bin/python
options=()
while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
done
run_folder=$("$python" -m dist_train.config.run_folder "$@")

# Submits a job and prints its number.
submit() {
    local answer
    answer=$(sbatch --parsable "$@")
    echo "${answer%%;*}"
}

# Submits one command as a job of one task: after JOB NAME COMMAND... It starts when JOB has ended well, and is
# withdrawn when it has not.
after() {
    local before=$1 name=$2
    shift 2
    submit --dependency="afterok:$before" --kill-on-invalid-dep=yes --job-name="$name" --output=slurm-%j.out <<END
#!/usr/bin/env bash
exec $(printf '%q ' "$@")
END
}

# Work that has to be done before training is submitted here, and the training job gets --dependency=afterok:ITS_NUMBER.
training=$(submit ${options[@]+"${options[@]}"} slurm/train.sbatch "$@")
echo "job $training trains $run_folder, log slurm-$training.out"
evaluation=$(after "$training" evaluate "$python" launch/evaluate.py "$run_folder")
echo "job $evaluation evaluates it, log slurm-$evaluation.out"
