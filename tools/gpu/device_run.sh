#!/usr/bin/env bash
# On a machine with one GPU, torch and no network, in a copy of the working tree with .device/ in it (device_kit.sh):
#
#   bash tools/gpu/device_run.sh                  # tests, stories, probe and benchmark: at most 10 minutes
#   bash tools/gpu/device_run.sh tests probe      # some of these parts, in this order
#   bash tools/gpu/device_run.sh bench 32 256     # the benchmark at these batch sizes
#   bash tools/gpu/device_run.sh --short          # one story, small batches, one turn: does all of it run?
#
# tests: tests/gpu, and gpu_stories.py beside it; stories: these alone; probe: gpu_probe.py; bench: python -m benchmarks.
# Logs and JSON go to $OUT (else .device/out); what failed and a table of the numbers are printed last.
# The environment chooses: STORIES=replay,store PROBES=steps,profile TESTS="-k graph" ROUNDS=3 SECONDS_A_TURN=0.5
# DEVICE=cpu. Ends with 0 when everything that was asked for ran and held.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kit=$PWD/.device
export OUT=${OUT:-$kit/out}
python=${PYTHON:-python3}
latest_start_seconds=${LATEST_START_SECONDS:-460} # of a batch size of the benchmark
parts=() batches=() short=
for argument in "$@"; do
    case $argument in
    --short) short=--short ;;
    tests | stories | probe | bench) parts+=("$argument") ;;
    *[!0-9]*) echo "error: $argument: there is tests, stories, probe, bench, --short, and batch sizes" >&2 && exit 2 ;;
    *) batches+=("$argument") ;;
    esac
done
((${#parts[@]})) || parts=(tests probe bench)
rounds=${ROUNDS:-3} seconds=${SECONDS_A_TURN:-0.5}
if [[ $short ]]; then
    ((${#batches[@]})) || batches=(256)
    rounds=1 seconds=0.2
fi
((${#batches[@]})) || batches=(32 256 1024 8192 65536)
mkdir -p "$OUT"
began=$SECONDS
passed() { echo $((SECONDS - began)); }
say() { echo "[$(passed) s] $*"; }

# What the machine lacks.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -f $kit/site.tar.xz ]]; then
    tar -xJf "$kit/site.tar.xz" -C "$site" 2>/dev/null ||
        "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$kit/site.tar.xz" "$site" ||
        exit 1
elif [[ -d $kit/wheels ]]; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$kit"/wheels/*.whl || exit 1
fi
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
# Else JAX, which the benchmark compares with, takes three quarters of the GPU's memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# What is compiled once is kept where it can be written.
export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$site/numba_cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$site/triton}
if ! "$python" -W ignore -c 'import numba' 2>"$site/numba.txt"; then
    say "numba cannot be imported here ($(tail -n 1 "$site/numba.txt")): the CPU takes the plain modules"
    echo 'import sys; sys.modules.setdefault("numba", None)' >"$site/sitecustomize.py"
fi
device=${DEVICE:-}
if [[ -z $device ]]; then
    device=cuda
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || device=cpu
fi
say "unpacked, device $device"
if [[ $device == cuda ]]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,temperature.gpu --format=csv,noheader
fi
failed=()

run() { # NAME SECONDS COMMAND...: output into NAME.log; says how it ended
    local name=$1 limit=$2 code
    shift 2
    timeout --kill-after=5 "$limit" "$@" >>"$OUT/$name.log" 2>&1
    code=$?
    say "$name: $( ((code == 0)) && echo done || echo "ended with $code")"
    return $code
}

stories() {
    run stories 200 "$python" -m tools.gpu.gpu_stories --device "$device" --out "$OUT/stories.json" \
        --only "${STORIES:-}" $short || failed+=(stories)
}

tests() {
    # The stories are played beside the tests: neither measures anything that is reported as a speed.
    (failed=(); stories; ((${#failed[@]} == 0))) &
    local beside=$!
    # No plugins but the two that the suite knows.
    # shellcheck disable=SC2086
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 run tests 200 "$python" -m pytest -p pytest_timeout -p xdist.plugin -n 4 -q \
        -p no:cacheprovider --timeout 150 --junitxml "$site/tests.xml" tests/gpu ${TESTS:-} || failed+=(tests)
    wait "$beside" || failed+=(stories)
}

probe() {
    run probe 170 "$python" -m tools.gpu.gpu_probe --device "$device" --out "$OUT/probe.json" \
        --only "${PROBES:-}" $short || failed+=(probe)
}

bench() {
    local batch only=gpu
    [[ $device == cpu ]] && only=throughput
    for batch in "${batches[@]}"; do
        if (($(passed) > latest_start_seconds)); then
            say "no time left for batch $batch"
            failed+=("bench $batch")
            continue
        fi
        # Each size on its own: what one of them breaks does not take the others along.
        run bench 100 "$python" -m benchmarks --only "$only" --batch "$batch" --rounds "$rounds" \
            --seconds "$seconds" --output "$site/bench_$batch.json" || failed+=("bench $batch")
    done
    "$python" -m tools.gpu.gpu_table --merge "$site" "$OUT/bench.json"
}

for part in "${parts[@]}"; do "$part"; done
for part in "${failed[@]}"; do
    log=$OUT/${part%% *}.log
    echo "--- the end of ${log##*/}, $part failed"
    tail -n 15 "$log" 2>/dev/null | cut -c1-200
done
"$python" -m tools.gpu.gpu_table "$OUT" --tests "$site/tests.xml"
if ((${#failed[@]})); then say "not all well: ${failed[*]}"; else say "all well"; fi
((${#failed[@]} == 0))
