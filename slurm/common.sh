# shellcheck shell=bash
# Sourced by train.sbatch, array.sbatch and node.sh: who they are, how a signal becomes a stop file, and how a child is
# waited for meanwhile.

! declare -F on_signal >/dev/null || return 0 # array.sbatch has been here already

restarts=${SLURM_RESTART_COUNT:-0} # Slurm sets it from the first restart on
attempt=$SLURM_JOB_ID.$restarts
# An element of an array is asked for in this form: the plain id of one of them stands for the whole array as well.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
who="job $job, start $((restarts + 1))"
run_folder=
signals=0
asked=

EXIT_MISTAKE=2

say() { printf '%(%F %T)T %s: %s\n' -1 "$who" "$*" >&2; }

refuse() {
    echo "error: $*" >&2
    exit $EXIT_MISTAKE
}

# Rank 0 looks for this file all the time. It names the attempt, so that one left over stops nobody. Once is enough:
# rank 0 takes the file away when it has obeyed.
ask_to_stop() {
    [[ -z $asked && -n $run_folder ]] || return 0
    mkdir -p -- "$run_folder" &&
        echo "$attempt" >"$run_folder/.stop.$attempt.$HOSTNAME.$$" &&
        mv -f -- "$run_folder/.stop.$attempt.$HOSTNAME.$$" "$run_folder/stop" &&
        asked=yes
}

# shellcheck disable=SC2317  # called by the traps
on_signal() {
    signals=$((signals + 1))
    ((signals > 1)) || say "got SIG$1: the run is asked to save and stop"
    ask_to_stop
}

# The signals are not handed on to torchrun: Slurm sends some of them twice, and a torchrun that is told twice leaves
# its ranks in the middle of their last save.
trap 'on_signal TERM' TERM
trap 'on_signal USR1' USR1
trap 'on_signal USR2' USR2
trap 'on_signal INT' INT
trap 'on_signal HUP' HUP

# shellcheck disable=SC2034  # `code` is for the caller
# Waits for a child and sets `code`. A signal ends `wait` early, with a code that is not the child's: then wait again.
wait_for() {
    local seen
    until
        seen=$signals
        wait "$1"
        code=$?
        ((signals == seen))
    do :; done
}

python=${DIST_TRAIN_VENV:-.venv}/bin/python
[[ -x $python ]] || refuse "$HOSTNAME: $python is not there: DIST_TRAIN_VENV must name an environment that it can see"
