#!/usr/bin/env bash
# Measures every claim of the README on one GPU, one after the other, each within its time.
#
#   MODEL=qwen2.5-coder-1.5b DRAFT=qwen2.5-coder-0.5b SMALL=smollm2-135m OUT=results/today benchmarks/gpu_session.sh
#   ... benchmarks/gpu_session.sh kernels throughput     # only these claims
#
# Each claim writes OUT/CLAIM.jsonl and OUT/CLAIM.log. A claim that has ended well is not run again; remove OUT/CLAIM.done to
# repeat it. The exit status is the number of claims that failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?a checkpoint folder}" "${OUT:?a folder for results}"
DRAFT=${DRAFT:-} SMALL=${SMALL:-$MODEL} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0
wanted=" $* "

# claim NAME SECONDS PROGRAM ARGUMENT ...: run a program of this folder
claim() {
  local name=$1 seconds=$2 program=$3
  shift 3
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  [[ ! -e $OUT/$name.done ]] || return 0
  echo "$name: begins, at most $seconds s; its log is $OUT/$name.log"
  if timeout --kill-after=30 "$seconds" "$PYTHON" "$here/$program" "$@" >>"$OUT/$name.log" 2>&1; then
    touch "$OUT/$name.done"
  else
    echo "$name: failed with status $?"
    failed=$((failed + 1))
  fi
}

engines=(plain sparsespec sparsespec,sparsespec_speculate=always sparsespec,sparsespec_kernels=flashinfer ngram)
[[ -z $DRAFT ]] || engines+=("standalone,speculative_draft_model_path=$DRAFT")
always=sparsespec,sparsespec_speculate=always

claim kernels 560 kernel_table.py --results "$OUT/kernels.jsonl" --time-limit 480
claim throughput 1500 throughput.py --model-path "$MODEL" --results "$OUT/throughput.jsonl" --time-limit 1380 --repeats 1 \
  --engines "${engines[@]}" --loads code:8192,128,512,0.6 code:4096,64,512,0.6 code:8192,16,512,0.6 code:2048,128,512,0.6
claim parity 560 parity.py --model-path "$SMALL" --results "$OUT/parity.jsonl" --short 10 --problems 20 --max-new-tokens 192 \
  --engines sparsespec sparsespec:pillar:unified sparsespec,sparsespec_kernels=flashinfer sparsespec,sparsespec_speculate=never
claim serving 900 serving.py --model-path "$MODEL" --results "$OUT/serving.jsonl" --rates 8 16 inf --dataset code:2048 \
  --requests 320 --max-running-requests 160
claim soak 300 soak.py --model-path "$MODEL" --results "$OUT/soak.jsonl" --time-limit 285
claim sampling 120 sampling.py --results "$OUT/sampling.jsonl"
claim profile 260 profile_round.py --model-path "$MODEL" --results "$OUT/profile.jsonl" --engines "$always" plain
claim kv-manager 700 kv_manager.py --model-path "$MODEL" --results "$OUT/kv-manager.jsonl" --time-limit 75 --requests 400 \
  --max-running-requests 160 --engines sparsespec,sparsespec_host_kv_gb=12 sparsespec plain plain,schedule_conservativeness=0
claim policies 900 throughput.py --model-path "$MODEL" --results "$OUT/policies.jsonl" --time-limit 780 --repeats 1 \
  --engines plain sparsespec:{pillar,streaming,vegas},sparsespec_speculate=always --loads code:8192,64,512,0.6
claim accept-length 400 accept_length.py --model-path "$MODEL" --results "$OUT/accept-length.jsonl" --prompts 16
claim accuracy 900 accuracy.py --model-path "$MODEL" --results "$OUT/accuracy.jsonl" --max-new-tokens 4096 --concurrency 128
exit "$failed"
