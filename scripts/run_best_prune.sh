#!/usr/bin/env bash
# Pruning with the weights that stay updated: main.py --recipe best, 50 % unstructured unless flags say otherwise.
#   MODEL=meta-llama/Llama-2-7b-hf bash scripts/run_best_prune.sh --sparsity_type 2:4
#   bash scripts/run_best_prune.sh --recipe max     # trains each block longer
# Results go to out/NAME-RECIPE-PATTERN. With nothing set: the demo model.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

MODEL=${MODEL:-demo/SmolLM2-135M-Instruct}

ratio=(--sparsity_ratio 0.5)
recipe=best
pattern=unstructured
save=
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
    flag=${arguments[i]%%=*}
    value=${arguments[i]#*=}
    [ "$value" != "${arguments[i]}" ] || value=${arguments[i + 1]:-}
    case $flag in
        --model) MODEL=$value ;;
        --recipe) recipe=$value ;;
        --save) save=$value ;;
        --sparsity_type)
            pattern=$value
            [ "$value" = unstructured ] || ratio=()
            ;;
    esac
done

size=()
if [ "$MODEL" = demo/SmolLM2-135M-Instruct ]; then
    python scripts/fetch_demo.py
    size=(--dataset demo/calibration.jsonl --eval_dataset demo/evaluation.jsonl --nsamples 16 --seq_length 512)
fi
save=${save:-out/$(basename "$MODEL")-$recipe-${pattern/:/-}}
python main.py --model "$MODEL" --prune_method wanda --recipe best "${ratio[@]}" "${size[@]}" \
    --save "$save" --save_model "$save/model" "$@"
