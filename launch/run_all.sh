#!/usr/bin/env bash
# From ImageNet's archives to both fine-tuned timm models: shards, pre-training, two fine-tunings,
# exports, exact accuracies. Every stage can be interrupted: the same command again continues
# with whatever is not finished, within a training run too.
#
#   IN22K=/archives/winter21_whole.tar.gz IN1K=/archives/ILSVRC2012 OUT=/big/disk \
#     bash launch/run_all.sh [flags of launch/pretrain.sh, such as --hostfile F --max-restarts 5] \
#       [-- key.sub=value "schedule.length=30 epochs" ...]     (settings of all training runs)
#
# IN22K  the ImageNet-22k archive or directory      IN1K  directory with the ImageNet-1k archives
# OUT    everything made (default runs/all)         STAGES  which of them (default: all)
# PRETRAIN, FINETUNE_224, FINETUNE_384   other configurations    OVERRIDES   more settings, one a line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh
python=$(find_python "$PWD")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${OUT:-runs/all}
stages=${STAGES:-shards22k shards1k pretrain finetune224 finetune384 export224 export384}
flags=() overrides=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do flags+=("$1"); shift; done
[ $# -eq 0 ] || { shift; overrides=("$@"); }
while IFS= read -r line; do [ -z "$line" ] || overrides+=("$line"); done <<<"${OVERRIDES:-}"
need() { [ -n "${!1:-}" ] || { echo "run_all.sh: error: set $1 ($2)" >&2; exit 2; }; }
say() { printf '\n== %s  (%s)\n' "$1" "$(date '+%F %T')"; }

stage_shards22k() {
  need IN22K "the ImageNet-22k archive or directory"
  "$python" -m data_prep build --dataset imagenet22k --source "$IN22K" \
    --out "$out/imagenet22k" --split both --val-per-class "${VAL_PER_CLASS:-5}"
}
stage_shards1k() {
  need IN1K "the directory with the ImageNet-1k archives"
  for part in train val; do
    "$python" -m data_prep build --dataset imagenet1k --source "$IN1K" \
      --out "$out/imagenet1k/$part" --split $part
  done
}
stage_pretrain() {
  bash launch/pretrain.sh "${flags[@]}" --config "${PRETRAIN:-pretrain/configs/in22k_base.yaml}" \
    run.dir="$out/pretrain" \
    data.train="$out/imagenet22k/train" data.val="$out/imagenet22k/val" "${overrides[@]}"
}
finetune() {
  bash launch/finetune.sh "${flags[@]}" --config "$2" run.dir="$out/finetune$1" \
    init.source="$out/pretrain" \
    data.train="$out/imagenet1k/train" data.val="$out/imagenet1k/val" "${overrides[@]}"
}
stage_finetune224() { finetune 224 "${FINETUNE_224:-finetune/configs/in22k_in1k_base_224.yaml}"; }
stage_finetune384() { finetune 384 "${FINETUNE_384:-finetune/configs/in22k_in1k_base_384.yaml}"; }
export_timm() {
  # The model card is part of the export and config.json its last file: there means finished.
  [ -e "$out/timm$1/config.json" ] ||
    "$python" -m finetune.export_timm --checkpoint "$out/finetune$1" --out "$out/timm$1"
  "$python" -m finetune.evaluate --model "$out/timm$1" --data "$out/imagenet1k/val" \
    --json "$out/accuracy$1.json"
}
stage_export224() { export_timm 224; }
stage_export384() { export_timm 384; }

mkdir -p "$out/finished"
for stage in $stages; do
  declare -F "stage_$stage" >/dev/null || { echo "run_all.sh: error: no stage $stage" >&2; exit 2; }
  if [ -e "$out/finished/$stage" ]; then
    say "$stage: finished before"
    continue
  fi
  say "$stage"
  status=0
  "stage_$stage" || status=$?
  if [ "$status" -ne 0 ]; then
    echo "run_all.sh: stage $stage ended with status $status; the same command continues it" >&2
    exit "$status"
  fi
  touch "$out/finished/$stage"
done
say "done: timm models in $out/timm224 and $out/timm384"
