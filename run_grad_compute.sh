#!/usr/bin/env bash
# Gradient norms of a model. With nothing set: of the demo model, over the demo text.
#   MODEL=meta-llama/Llama-2-7b-hf bash run_grad_compute.sh --nsamples 128
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

MODEL=${MODEL:-demo/SmolLM2-135M-Instruct}
LLAMA_VERSION=${LLAMA_VERSION:-2}
size=()
if [ "$MODEL" = demo/SmolLM2-135M-Instruct ]; then
    python scripts/fetch_demo.py
    size=(--dataset demo/calibration.jsonl --nsamples 16 --seq_length 512) # minutes on two cores; the paper uses 128 x 2048 of C4
fi
python gradient_computation.py --model "$MODEL" --llama_version "$LLAMA_VERSION" ${size[@]+"${size[@]}"} "$@"
