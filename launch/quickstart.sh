#!/usr/bin/env bash
# The whole pipeline on small real images (1,797 scanned digits), on 2 CPU cores:
#   raw archives -> shards -> pretrain (DeepSpeed, 2 ranks) -> fine-tune, larger -> timm -> accuracy
# Usage: bash launch/quickstart.sh [key.sub=value ...]     (settings of both training runs)
# QUICKSTART_DIR=DIR says where; the same command again continues whatever was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS
python=$(bash launch/install.sh requirements.txt)
export PATH=$(dirname "$python"):$PATH PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TF_CPP_MIN_LOG_LEVEL=3
out=${QUICKSTART_DIR:-runs/quickstart}
mkdir -p "$out"
step() { printf '\n== %s  [%d s since start]\n' "$1" $((SECONDS - began)); }

step "1/7 raw release: one tar holding one tar per class, as ImageNet-22k is shipped"
[ -e "$out/raw/digits_whole.tar" ] || python -m data_prep digits --out "$out/raw"

step "2/7 data preparation: strict decode, global shuffle, shards, indexes, manifest"
python -m data_prep build --dataset imagenet22k --source "$out/raw/digits_whole.tar" \
  --out "$out/shards" --split both --val-fraction 0.2 --shard-bytes 512K --workers 2

step "3/7 verification of every shard"
python -m data_prep verify "$out/shards/train"
python -m data_prep verify "$out/shards/val"
data=(data.train="$out/shards/train" data.val="$out/shards/val")

step "4/7 pre-training at 64 pixels, windows of 2"
bash launch/pretrain.sh --config pretrain/configs/quickstart_pretrain.yaml \
  run.dir="$out/pretrain" "${data[@]}" "$@"

step "5/7 fine-tuning at 96 pixels, windows of 3, a new head"
bash launch/finetune.sh --config finetune/configs/quickstart_finetune.yaml \
  run.dir="$out/finetune" init.source="$out/pretrain" "${data[@]}" "$@"

step "6/7 export to timm, proved on real images"
python -m finetune.export_timm --checkpoint "$out/finetune" --out "$out/timm"

step "7/7 accuracy of the trained run and of the exported model"
python -m finetune.evaluate --model "$out/finetune" --data "$out/shards/val" \
  --json "$out/run_accuracy.json"
python -m finetune.evaluate --model "$out/timm" --data "$out/shards/val" \
  --json "$out/timm_accuracy.json"

python launch/quickstart_table.py "$out" --seconds $((SECONDS - began))
