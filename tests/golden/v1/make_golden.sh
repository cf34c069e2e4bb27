#!/usr/bin/env bash
# make_golden.sh CLONE: how the runs and stores beside this script came about (old code, commit 53f6428).
# Run inside this folder: all paths in the artefacts are relative to it.
set -euo pipefail
cd "$(dirname "$0")"
clone=$1; py=$clone/.venv/bin/python
export OMP_NUM_THREADS=1
common="data.path=table.csv data.target=outcome data.split_column=part data.categorical=[branch] run.dir=runs
  model.hidden_dim=16 train.global_batch_size=32 train.epochs=3 schedule.warmup_steps=5 optim.lr=0.01
  checkpoint.every_steps=5 checkpoint.keep=2 log.every_steps=1 wandb.mode=disabled runtime.device=cpu"
train() { echo "+ train $*"; "$py" "$clone/launch/train.py" $common "$@"; }
stop_at() { step=$1; shift; echo "+ stopped by SIGUSR1 at step $step: $*"
  "$py" "$clone/tests/resume/driver.py" "{\"step\": $step, \"signal\": 10}" $common "$@"; }

rm -rf runs stores continued
train run.name=fast
train run.name=exact train.virtual_ranks=2
train run.name=ema_embedding train.ema_decay=0.9 model.embedding_dim=4
stop_at 14 run.name=interrupted_exact train.virtual_ranks=2
stop_at 14 run.name=interrupted_fast
store="data.target=outcome data.split_column=part data.categorical=[branch]"
"$py" "$clone/launch/prepare.py" table.csv stores/onehot $store
"$py" "$clone/launch/prepare.py" table.csv stores/embedded $store model.embedding_dim=4
train run.name=exact_store train.virtual_ranks=2 data.path=stores/onehot
find runs stores -name lock -delete   # held the host name

# continued by the old code, in a copy; what it ended with is kept
scratch=$(mktemp -d)
for name in interrupted_exact interrupted_fast; do
  mkdir -p "$scratch/$name/runs" "continued/$name"
  cp -r "runs/$name" "$scratch/$name/runs/"; cp table.csv "$scratch/$name/"
  v=null; [ $name = interrupted_exact ] && v=2
  (cd "$scratch/$name" && train run.name=$name train.virtual_ranks=$v)
  cp "$scratch/$name/runs/$name/"{summary.json,metrics.jsonl} "continued/$name/"
done
rm -rf "$scratch"
