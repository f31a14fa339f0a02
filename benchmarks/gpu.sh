#!/bin/bash
# All GPU tests and benchmarks, most valuable first, one command:
#
#     benchmarks/gpu.sh [--dry-run] [--again] [NAME ...]
#
# A step that has passed on this commit and GPU leaves a stamp in benchmarks/results/ and is skipped the next time, so an
# interrupted run goes on where it stopped. --again ignores the stamps, NAME selects steps, --dry-run (also without a
# GPU) prints the steps. A failing step does not stop the others; the exit code says whether all passed.
set -eu -o pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
results=benchmarks/results
dry=0
again=0
chosen=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry=1 ;;
    --again) again=1 ;;
    -h | --help) sed -n '2,9p' "$0"; exit 0 ;;
    -*) echo "benchmarks/gpu.sh: unknown option $argument" >&2; exit 2 ;;
    *) chosen+=("$argument") ;;
  esac
done

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unversioned)
if [ "$dry" -eq 0 ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh: torch sees no GPU here; --dry-run lists what would run" >&2
    exit 2
  }
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
  mkdir -p "$results"
else
  gpu=any
fi
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}

failed=()
known=()
step() { # step NAME COMMAND...
  local name=$1
  shift
  known+=("$name")
  if [ "${#chosen[@]}" -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return 0; fi
  local stamp="$results/gpu-$gpu-$name.stamp" log="$results/gpu-$gpu-$name.log"
  if [ "$dry" -eq 1 ]; then
    printf '%-22s %s\n' "$name" "$*"
  elif [ "$again" -eq 0 ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$commit" ]; then
    echo "$name: passed on $commit already"
  elif "$@" 2>&1 | tee "$log"; then
    echo "$commit" > "$stamp"
  else
    echo "$name: FAILED, see $log" >&2
    failed+=("$name")
  fi
}

# Most valuable first. Later work adds its steps where they belong in that order.
step doctor "$python" -m train.doctor
# Goals: ffn_act_mask >= 85 % of the copy bandwidth both ways, hard_concrete <= 3 launches a step.
step kernels_build "$python" -m models.kernels.build --report
kernel_tests=(tests/gpu/test_kernels.py tests/gpu/test_attention_kernels.py)
step kernels_tests "$python" -m pytest "${kernel_tests[@]}" -q
if command -v compute-sanitizer > /dev/null; then
  for check in memcheck racecheck initcheck synccheck; do
    step "kernels_$check" compute-sanitizer --tool "$check" --error-exitcode 1 \
      "$python" -m pytest "${kernel_tests[@]}" -q --timeout 0 \
      -k "layouts or hard_concrete or fold or quick_gelu or masks_weights or pack_tokens"
  done
else
  echo "no compute-sanitizer here: the kernels' memory and races stay unchecked" >&2
fi
step kernels "$python" benchmarks/kernels.py --json "$results/kernels-$gpu.json"
step tests "$python" -m pytest -m gpu -q
# Goals at equal precision: >= 2x and <= 1/2 of the peak memory at 224 px, >= 4x and <= 1/3 at 384 px.
# Each setting is an entry of one file, made to take less than ten minutes.
distill=("$python" benchmarks/distill_step.py --device cuda --warmup 3 --steps 10
  --json "$results/distill_step-$gpu.json")
step distill_224 "${distill[@]}" --batch 128 --dtype bf16
step distill_384 "${distill[@]}" --batch 64 --image-size 384 --dtype bf16
step distill_224_published "${distill[@]}" --batch 128 --dtype bf16 --eager-dtype fp16
step distill_384_published "${distill[@]}" --batch 64 --image-size 384 --dtype bf16 --eager-dtype fp16
compiled=(--dtype bf16 --rounds 2 --set engine.compile=default teacher.compile=default)
step distill_224_compiled "${distill[@]}" --batch 128 "${compiled[@]}"
step distill_384_compiled "${distill[@]}" --batch 64 --image-size 384 "${compiled[@]}"
step model_step "$python" benchmarks/model_step.py --variants plain ours checkpointed compiled --json "$results/model_step-$gpu.json"
# Goal: >= 1.5x at 60 % of the gates closed.
step prune_step "$python" benchmarks/prune_step.py --json "$results/prune_step-$gpu.json"
# Goals: trimming alone >= 1.8x the student at half its MACs in batch; pruned and trimmed >= 5x the teacher.
step trim_speed "$python" benchmarks/trim_speed.py --device cuda --dtype bf16 --batch 1 8 32 128 --rounds 20 \
  --json "$results/trim_speed-$gpu.json"
step fused_qkv "$python" benchmarks/fused_qkv.py --json "$results/fused_qkv-$gpu.json"
# These hide the GPUs and take minutes of the CPU: they show that torch and DeepSpeed of this machine go together.
step distributed "$python" -m pytest tests/distributed -q
# Accuracy does not depend on the device: it trains on the CPU, resumes, and takes hours.
step trimming "$python" benchmarks/trimming.py --tasks vqa:3,retrieval:3 --budgets 0.75 0.5 0.35 --max-hours 3
step pretrain_kd_gain "$python" benchmarks/pretrain_kd_gain.py --steps 300 --seeds 0 1 2 \
  --json "$results/pretrain_kd_gain-$gpu.json"

for name in "${chosen[@]+"${chosen[@]}"}"; do
  if [[ " ${known[*]} " != *" $name "* ]]; then
    echo "benchmarks/gpu.sh: no step $name; steps: ${known[*]}" >&2
    exit 2
  fi
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
