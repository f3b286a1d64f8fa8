#!/usr/bin/env bash
# What a machine with a GPU has to prove, in minutes and without a network: scripts/gpu_check.py says what. With --device cpu
# it is a rehearsal with a small model, for machines without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export HF_HUB_OFFLINE=1
exec python scripts/gpu_check.py "$@"
