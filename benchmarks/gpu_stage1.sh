#!/usr/bin/env bash
# Stage 1 on one H100: correctness on the card, then the step of Llama-2-7B's shape and of two small models.
#
#   benchmarks/gpu_stage1.sh [folder for the outputs]     about 15 minutes; run it from the checkout
#
# Each part prints the versions, the equality of loss and gradient, and the figures; a part that fails doesn't stop the
# next one, but the script then ends with exit code 1. MODELS is the folder of the GGUF models.
set -u -o pipefail

OUT=${1:-stage1-gpu}
MODELS=${MODELS:-models}
PYTHON=${PYTHON:-python}
SHAPE=(--shape llama-2-7b --dtype bfloat16 --tuning lora --steps 10)
mkdir -p "$OUT"
failed=0

part() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$OUT/$name.txt" || { echo "== $name failed"; failed=1; }
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$OUT/card.txt"

# Variable-length flash along the paths: causal aligned to the last key, windows, groups, a backward in fixed order.
part attention "$PYTHON" -m pytest -q -m gpu tests/training

# The paper's batch: 2 joint examples, K = 5, LoRA rank 32 on q_proj and v_proj; short and long prompts.
part 7b-short "$PYTHON" benchmarks/stage1.py "${SHAPE[@]}" --batch 2 --k 5 --prompt 30 --answer 90 --normal 45
part 7b-long "$PYTHON" benchmarks/stage1.py "${SHAPE[@]}" --batch 2 --k 5 --prompt 512 --answer 128 --normal 256

# About 10,000 tokens a step: MFU. Padded ways need more memory than the card has at some of these sizes.
part 7b-10k-short "$PYTHON" benchmarks/stage1.py "${SHAPE[@]}" --ways flat tree --batch 16 --k 5 --prompt 30 \
    --answer 90 --normal 45
part 7b-10k-long "$PYTHON" benchmarks/stage1.py "${SHAPE[@]}" --ways flat tree --batch 6 --k 5 --prompt 512 \
    --answer 128 --normal 256 --checkpointing

# TRL's packed fine-tuning on the same rows, cross-entropy alone.
part 7b-trl-short "$PYTHON" benchmarks/stage1.py "${SHAPE[@]}" --ways flat tree --batch 16 --k 5 --prompt 30 \
    --answer 90 --normal 45 --trl
part 7b-trl-long "$PYTHON" benchmarks/stage1.py "${SHAPE[@]}" --ways flat tree --batch 2 --k 5 --prompt 512 \
    --answer 128 --normal 256 --trl

# Small models, all weights, float32 and bfloat16 autocast.
SMOL=("$MODELS/smollm2-135m-instruct" --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf)
GEMMA=("$MODELS/gemma-3-270m" --gguf-file gemma-3-270m-q4_k_m.gguf)
for batch in 2 16; do
    part "smollm2-b$batch" "$PYTHON" benchmarks/stage1.py --model "${SMOL[@]}" --batch "$batch" --steps 10
    part "gemma3-b$batch" "$PYTHON" benchmarks/stage1.py --model "${GEMMA[@]}" --batch "$batch" --steps 10
done
exit $failed
