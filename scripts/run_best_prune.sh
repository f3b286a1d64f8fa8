#!/usr/bin/env bash
# run_gblm_prune.sh with wanda and --recipe best: the weights that stay are updated, and each block is trained.
#   MODEL=meta-llama/Llama-2-7b-hf bash scripts/run_best_prune.sh --sparsity_type 2:4
#   bash scripts/run_best_prune.sh --recipe max     # trains each block longer
set -euo pipefail
exec bash "$(dirname "$0")/../run_gblm_prune.sh" --prune_method wanda --recipe best "$@"
