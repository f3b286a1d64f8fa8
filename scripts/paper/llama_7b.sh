#!/usr/bin/env bash
# The paper's tables for LLaMA-1-7B; flags and variables are those of scripts/paper/paper_tables.sh.
#   bash scripts/paper/llama_7b.sh --dry_run
set -euo pipefail
export MODEL=${MODEL:-huggyllama/llama-7b} LLAMA_VERSION=1
exec bash "$(dirname "$0")/paper_tables.sh" "$@"
