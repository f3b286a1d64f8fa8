#!/usr/bin/env bash
# All checks: style, shell syntax, tests. --fast leaves out the tests that need the demo model and real text.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

ruff check .
ruff format --check .
for script in *.sh scripts/*.sh scripts/*/*.sh .ci/run; do bash -n "$script"; done
python -m pytest -m "not slow" -n 2
if [ "${1:-}" != --fast ]; then
    python scripts/fetch_demo.py
    python -m pytest -m slow
fi
