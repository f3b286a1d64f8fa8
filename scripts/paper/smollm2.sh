#!/usr/bin/env bash
# The paper's tables for the demo model, on the demo text, in small. Flags and variables are those of
# scripts/paper/paper_tables.sh.
#   bash scripts/paper/smollm2.sh --dry_run
set -euo pipefail
export MODEL=demo/SmolLM2-135M-Instruct NSAMPLES=${NSAMPLES:-16} SAMPLES=${SAMPLES:-1 2 4 8 16}
exec bash "$(dirname "$0")/paper_tables.sh" --dataset demo/calibration.jsonl --seq_length 512 "$@" -- \
    --eval_dataset demo/evaluation.jsonl
