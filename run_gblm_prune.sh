#!/usr/bin/env bash
# Prune a model with GBLM-Pruner, 50 % unstructured unless flags say otherwise. With nothing set: the demo model.
#   MODEL=meta-llama/Llama-2-7b-hf LLAMA_VERSION=2 bash run_gblm_prune.sh --sparsity_type 2:4
# Results go to out/NAME-METHOD-PATTERN, of a --recipe to out/NAME-METHOD-RECIPE-PATTERN. Finished gradients are used again;
# delete their folder to compute them anew.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

MODEL=${MODEL:-demo/SmolLM2-135M-Instruct}
LLAMA_VERSION=${LLAMA_VERSION:-2}

# The flags that gradient_computation.py has to share with main.py, and those that decide whether it runs at all.
common=()
needs_gradients=yes
ratio=(--sparsity_ratio 0.5)
method=gblm
pattern=unstructured
recipe=
save=
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
    flag=${arguments[i]%%=*}
    value=${arguments[i]#*=}
    [ "$value" != "${arguments[i]}" ] || value=${arguments[i + 1]:-}
    case $flag in
        --nsamples | --seq_length | --seed | --cache_dir | --revision | --dtype | --device | --dataset | --text_column | --bos | \
            --data_dir | --memory | --activation_memory)
            common+=("$flag" "$value")
            ;;
        --model) MODEL=$value ;;
        --pack | --trust_remote_code) common+=("$flag") ;;
        --prune_method) method=$value ;;
        --recipe) recipe=-$value ;;
        --sparsity_type)
            pattern=$value
            [ "$value" = unstructured ] || ratio=()
            ;;
        --save) save=$value ;;
        --gradient_path | -h | --help) needs_gradients=no ;;
    esac
done
name=$(basename "$MODEL")
gradients=gradients/llama$LLAMA_VERSION/gradients_aggregrate_norm_l2_model_$name
case $method in magnitude | wanda | sparsegpt) needs_gradients=no ;; esac

size=()
if [ "$MODEL" = demo/SmolLM2-135M-Instruct ]; then
    python scripts/fetch_demo.py
    size=(--dataset demo/calibration.jsonl --eval_dataset demo/evaluation.jsonl --nsamples 16 --seq_length 512)
fi
using=()
if [ "$needs_gradients" = yes ]; then
    if [ ! -f "$gradients/index.json" ]; then
        MODEL=$MODEL LLAMA_VERSION=$LLAMA_VERSION bash run_grad_compute.sh ${common[@]+"${common[@]}"}
    fi
    using=(--gradient_path "$gradients")
fi
save=${save:-out/$name-$method$recipe-${pattern/:/-}}
# Without the + an empty array is an unset variable to bash 3.2, which macOS has.
python main.py --model "$MODEL" --prune_method gblm ${ratio[@]+"${ratio[@]}"} ${using[@]+"${using[@]}"} \
    ${size[@]+"${size[@]}"} --save "$save" --save_model "$save/model" "$@"
