#!/usr/bin/env bash
# Prepare, train, evaluate on the test rows: jobs that wait for one another. From the repository root:
#   slurm/pipeline.sh [--prepare=COMMAND] [--nodes=N --gpus-per-node=G ...] configs/credit_risk.yaml [key=value ...]
#
# COMMAND is a line of shell that makes the data, a job of one task. The other options go to the training job, but
# --dependency is for whichever job is the first. What every job needs goes into Slurm's own variables:
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS. A job that is requeued keeps its number, so the next one waits for its
# real end.
set -euo pipefail

if [[ ! -f slurm/train.sbatch ]]; then
    echo "error: $PWD is not the repository root" >&2
    exit 2
fi
python=${DIST_TRAIN_VENV:-.venv}/bin/python
prepare= options=() waits=()
while [[ ${1:-} == -* ]]; do
    case $1 in
    --prepare=*) prepare=${1#*=} ;;
    --dependency=*) waits=("$1") ;;
    *) options+=("$1") ;;
    esac
    shift
done
run_folder=$("$python" -m dist_train.config.run_path "$@")

# Submits a job that waits as `waits` says, and sets `job` to its number. The next one starts when this one has ended
# well, and is withdrawn when it has not.
submit() {
    local answer
    answer=$(sbatch --parsable ${waits[@]+"${waits[@]}"} "$@")
    job=${answer%%;*}
    waits=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
}

# Submits one command as a job of one task: NAME COMMAND...
submit_command() {
    submit --job-name="$1" --output=slurm-%j.out <<END
#!/usr/bin/env bash
exec $(printf '%q ' "${@:2}")
END
}

if [[ -n $prepare ]]; then
    submit_command prepare bash -c "$prepare"
    echo "job $job prepares the data, log slurm-$job.out"
fi
submit ${options[@]+"${options[@]}"} slurm/train.sbatch "$@"
echo "job $job trains $run_folder, log slurm-$job.out"
submit_command evaluate "$python" launch/evaluate.py "$run_folder"
echo "job $job evaluates it, log slurm-$job.out"
