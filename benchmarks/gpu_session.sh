#!/usr/bin/env bash
# Measures every claim of the README on one GPU, one after the other, each within its time.
#
#   MODEL=qwen2.5-coder-1.5b DRAFT=qwen2.5-coder-0.5b SMALL=smollm2-135m OUT=results/today benchmarks/gpu_session.sh
#   ... benchmarks/gpu_session.sh kernels throughput     # only these claims
#
# Each claim writes OUT/CLAIM.jsonl and OUT/CLAIM.log. A claim that has ended well is not run again; remove OUT/CLAIM.done to
# repeat it. One that its time limit ended goes on where it was when it is called again. The exit status is the number of
# claims that failed. "About" is an estimate for one H200 and the 1.5B model from the rates in docs/results.md, a minute for an
# engine's start (vLLM's first takes 150 s), and 100,000 prompt tokens/s, which is an assumption.
#
# Further variables: VLLM_PYTHON, a command that starts a Python with vLLM, such as "env PYTHONPATH=/tmp/vllm-site python3"
# (without it vLLM is left out); SHAPES, a folder of model_shapes.py (without it long-shapes is left out); REPEATS (default 3);
# SERVERS, "plain=sglang@http://127.0.0.1:30000 new=sglang@http://127.0.0.1:30001 ...", servers of MODEL that run already, such
# as several builds of the plugin (without it builds is left out).
# Prompts are made on a machine without a GPU by MAKE_PROMPTS=1, which runs nothing else; OUT/*.prompts.json then go along.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?a checkpoint folder}" "${OUT:?a folder for results}"
DRAFT=${DRAFT:-} SMALL=${SMALL:-$MODEL} PYTHON=${PYTHON:-python3} VLLM_PYTHON=${VLLM_PYTHON:-} SHAPES=${SHAPES:-}
REPEATS=${REPEATS:-3} MAKE_PROMPTS=${MAKE_PROMPTS:-} SERVERS=${SERVERS:-}
mkdir -p "$OUT"
failed=0
wanted=" $* "

# claim NAME SECONDS PROGRAM ARGUMENT ...: run a program of this folder
claim() {
  local name=$1 seconds=$2 program=$3
  shift 3
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  [[ ! -e $OUT/$name.done ]] || return 0
  if [[ -n $MAKE_PROMPTS ]]; then
    [[ $program != throughput.py && $program != serving.py ]] || "$PYTHON" "$here/$program" "$@" --make-prompts ||
      failed=$((failed + 1))
    return 0
  fi
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

# Others, each at its own defaults. The last one is not lossless, and is marked so.
vllm=()
[[ -z $VLLM_PYTHON ]] || vllm=(vllm vllm:ngram)
fp8=plain,quantization=fp8,kv_cache_dtype=fp8_e4m3
fast=(plain sparsespec "${vllm[@]}" "$fp8")
rivals=("${fast[@]}" ngram)
[[ -z $DRAFT ]] || rivals+=("standalone,speculative_draft_model_path=$DRAFT")
python_of_vllm=(--vllm-python "${VLLM_PYTHON:-$PYTHON}")

# Each row has what the rows above it have, and one thing more; the last one stands beside the fourth.
first="$always,sparsespec_draft_weights=model"
ablation=(
  plain
  "$first,disable_overlap_schedule=true"        # PillarAttn, verified at once
  "$first"                                      # delayed verification
  "$always"                                     # quantised drafts
  sparsespec                                    # the planner
  sparsespec,sparsespec_host_kv_gb=24           # the KV manager
  sparsespec:pillar:unified,sparsespec_speculate=always
)

claim kernels 560 kernel_table.py --results "$OUT/kernels.jsonl" --time-limit 480
claim throughput 1500 throughput.py --model-path "$MODEL" --results "$OUT/throughput.jsonl" --time-limit 1380 --repeats 1 \
  --engines "${engines[@]}" --loads code:8192,128,512,0.6 code:4096,64,512,0.6 code:8192,16,512,0.6 code:2048,128,512,0.6
# How many tokens drafts should attend to at least, by the number of requests. About 2 minutes an engine.
claim budgets 595 throughput.py --model-path "$MODEL" --results "$OUT/budgets.jsonl" --time-limit 540 --repeats 2 \
  --engines sparsespec sparsespec,sparsespec_min_budget={256,512,768} \
  --loads code:512,1,512,0 code:4096,{4,64},512,0.6 code:8192,16,512,0.6 code:2048,{32,128},512,0.6 code:1024,256,512,0.6
# Servers that run already, in turn. About 25 s a server and repeat.
[[ -z $SERVERS ]] || claim builds 595 throughput.py --model-path "$MODEL" --results "$OUT/builds.jsonl" --time-limit 540 \
  --repeats "$REPEATS" --engines --attach $SERVERS \
  --loads code:512,1,512,0 code:4096,{4,64},512,0.6 code:8192,16,512,0.6 code:2048,{32,128},512,0.6
# About 20 minutes with three repeats: 2 each, NGRAM and STANDALONE 3, vLLM 5 and 3.
claim rivals 595 throughput.py --model-path "$MODEL" --results "$OUT/rivals.jsonl" --time-limit 440 --repeats "$REPEATS" \
  --engines "${rivals[@]}" "${python_of_vllm[@]}" --loads code:8192,128,512,0.6 code:2048,128,512,0.6
# Long outputs, the batch kept full. Four requests for each place in the batch: requests are accepted unevenly, those that are
# accepted well leave first, and with two for each place the time in which the batch is full has too many of them. About 60 s for
# a run of 4,096 tokens, two loads; NGRAM 150 s, STANDALONE 100 s: with three repeats 7 minutes an engine, 16 and 11 those two,
# vLLM's first 9.
claim long-4k 595 throughput.py --model-path "$MODEL" --results "$OUT/long-4k.jsonl" --time-limit 540 --repeats "$REPEATS" \
  --engines "${rivals[@]}" "${python_of_vllm[@]}" --loads {aime+olympiadbench,code-reading},64,4096,0.6,256
# About 140 s a run: with three repeats 8 minutes an engine.
claim long-8k 595 throughput.py --model-path "$MODEL" --results "$OUT/long-8k.jsonl" --time-limit 540 --repeats "$REPEATS" \
  --engines "${fast[@]}" "${python_of_vllm[@]}" --loads aime+olympiadbench,64,8192,0.6,256
# About 400 s a run: with one repeat 8 minutes an engine.
claim long-16k 595 throughput.py --model-path "$MODEL" --results "$OUT/long-16k.jsonl" --time-limit 540 \
  --repeats 1 --engines "${fast[@]}" "${python_of_vllm[@]}" --loads aime+olympiadbench,64,16384,0.6,256
# Shapes of a larger model, SIMULATED but for vLLM, which does not speculate. About 160 s a run of plain's with the 8B shapes.
[[ -z $SHAPES ]] || SGLANG_SIMULATE_ACC_LEN=${SIMULATED_LENGTH:-7.02} claim long-shapes 595 throughput.py --repeats 1 \
  --model-path "$SHAPES" --load-format dummy --results "$OUT/long-shapes.jsonl" --time-limit 540 \
  --engines plain sparsespec "${vllm[@]:0:1}" "${python_of_vllm[@]}" --engine-args '{"skip_tokenizer_init":true}' \
  --loads random:128,64,4096,0.6,256
# The pool holds some four tenths of what 128 requests of 8,192 tokens need at most. About 160 s each, 19 minutes.
claim ablation 595 throughput.py --model-path "$MODEL" --results "$OUT/ablation.jsonl" --time-limit 540 --repeats 1 \
  --engines "${ablation[@]}" --engine-args '{"max_total_tokens":400000}' --loads aime+olympiadbench,128,8192,0.6,192
claim parity 560 parity.py --model-path "$SMALL" --results "$OUT/parity.jsonl" --short 10 --problems 20 --max-new-tokens 192 \
  --engines sparsespec sparsespec:pillar:unified sparsespec,sparsespec_kernels=flashinfer sparsespec,sparsespec_speculate=never
# Ten thousand generations, and a control that shows how far ties reach. About 5 minutes: 3 starts, 480,000 tokens twice.
claim parity-10k 590 parity.py --model-path "$MODEL" --results "$OUT/parity-10k.jsonl" --short 0 --problems 0 --long 0 \
  --cuts 10000 --max-new-tokens 48 --alternatives 10 --concurrency 256 --control-prompts 1000 --engines plain:triton sparsespec
# About 7 minutes an engine: 85 s for its start with prefill graphs, 320 requests at shares of some 20 requests/s, and 25 s for
# each start of bench_serving.
claim serving 595 serving.py --model-path "$MODEL" --results "$OUT/serving.jsonl" --rates inf 25% 50% 75% 90% \
  --dataset code:512 code:2048 code:8192 --new-tokens 128 512 1024 --requests 320 --max-running-requests 160 \
  --temperature 0.6 --time-limit 440
# Three starts (one after a kill), and 4,000 requests at ten times a pool of 16,384 tokens. Not timed on a GPU yet.
claim soak 595 soak.py --model-path "$MODEL" --results "$OUT/soak.jsonl" --time-limit 560
claim sampling 120 sampling.py --results "$OUT/sampling.jsonl"
# What draws and acceptance cost, and whether the host waits for the GPU when it launches a round.
claim profile-sampled 200 profile_round.py --model-path "$MODEL" --results "$OUT/profile-sampled.jsonl" --temperature 0.6 \
  --cases code:8192,{16,64,128} --engines "$always"
claim profile 260 profile_round.py --model-path "$MODEL" --results "$OUT/profile.jsonl" --engines "$always" plain
# The whole of 1,440,000 tokens, of which the pool holds half of what runs. About 4 minutes an engine.
claim kv-manager 595 kv_manager.py --model-path "$MODEL" --results "$OUT/kv-manager.jsonl" --requests 400 \
  --max-running-requests 160 --engines sparsespec,sparsespec_host_kv_gb=12 sparsespec
claim kv-manager-plain 595 kv_manager.py --model-path "$MODEL" --results "$OUT/kv-manager-plain.jsonl" --requests 400 \
  --max-running-requests 160 --engines plain plain,schedule_conservativeness=0
# The same with the shapes of a larger model, whose KV takes most of a step; SIMULATED. About 200, 215 and 290 s.
[[ -z $SHAPES ]] || SGLANG_SIMULATE_ACC_LEN=${SIMULATED_LENGTH:-7.02} claim kv-manager-shapes 900 kv_manager.py \
  --model-path "$SHAPES" --load-format dummy --results "$OUT/kv-manager-shapes.jsonl" --requests 200 \
  --max-total-tokens 300000 --max-running-requests 160 --engines sparsespec,sparsespec_host_kv_gb=24 sparsespec plain \
  --engine-args '{"skip_tokenizer_init":true}'
# About 9 minutes: 5 starts, 7 s a run of most, 30 s of triforce, and 10 s of prefill each.
claim policies 900 throughput.py --model-path "$MODEL" --results "$OUT/policies.jsonl" --time-limit 780 --repeats 1 \
  --engines plain sparsespec:{pillar,streaming,vegas,triforce},sparsespec_speculate=always --loads code:8192,64,512,0.6
claim accept-length 400 accept_length.py --model-path "$MODEL" --results "$OUT/accept-length.jsonl" --prompts 16
# 306 questions four times. About 3 minutes an engine. Its answers are in OUT/accuracy-*.answers.jsonl: the same command without
# --generate-only grades them afterwards, at the same commit on a machine without a GPU.
claim accuracy 595 accuracy.py --model-path "$MODEL" --results "$OUT/accuracy.jsonl" --max-new-tokens 4096 --concurrency 128 \
  --samples 4 --generate-only
exit "$failed"
