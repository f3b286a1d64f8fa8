#!/usr/bin/env bash
# run_gblm_prune.sh with gradient, the score without activations.
#   bash scripts/run_gradient_prune.sh --sparsity_type 2:4
set -euo pipefail
exec bash "$(dirname "$0")/../run_gblm_prune.sh" --prune_method gradient "$@"
