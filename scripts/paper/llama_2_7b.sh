#!/usr/bin/env bash
# The paper's tables for LLaMA-2-7B; flags and variables are those of scripts/paper/paper_tables.sh.
#   bash scripts/paper/llama_2_7b.sh --dry_run
set -euo pipefail
export MODEL=${MODEL:-meta-llama/Llama-2-7b-hf} LLAMA_VERSION=2
exec bash "$(dirname "$0")/paper_tables.sh" "$@"
