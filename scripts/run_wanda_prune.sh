#!/usr/bin/env bash
# run_gblm_prune.sh with wanda: needs no gradients.
#   bash scripts/run_wanda_prune.sh --sparsity_type 2:4
set -euo pipefail
exec bash "$(dirname "$0")/../run_gblm_prune.sh" --prune_method wanda "$@"
