#!/usr/bin/env bash
# Every table of the paper for one model, as runs of both commands, results in out/NAME/; llama_2_7b.sh and so on name a model.
#   MODEL=meta-llama/Llama-2-7b-hf bash scripts/paper/paper_tables.sh --dry_run
#   python scripts/collect_results.py out/
# --dry_run prints the commands. TABLES chooses among them. Other flags go to both commands, those behind -- to main.py alone.
# What is finished is left out, what was interrupted is repeated: a series that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."

MODEL=${MODEL:?is not set: a folder, or a name on the hub}
LLAMA_VERSION=${LLAMA_VERSION:-2}
TABLES=${TABLES:-methods sparsity samples seeds norms alpha}
NSAMPLES=${NSAMPLES:-128}
SAMPLES=${SAMPLES:-1 2 4 8 16 32 64 128}
SEEDS=${SEEDS:-0 1 2 3 4}
ALPHAS=${ALPHAS:-1 10 1000 10000 100000} # beside 100, the paper's
name=$(basename "$MODEL")

common=()
pruning=()
dry_run=no
behind=no
for argument in "$@"; do
    case $argument in
        --dry_run) dry_run=yes ;;
        --) behind=yes ;;
        *) if [ $behind = yes ]; then pruning+=("$argument"); else common+=("$argument"); fi ;;
    esac
done

finished() { # the file that says whether a command is done
    case $1 in
        # An interrupted run has results too. Their status tells how far it came.
        */results.json) grep -qs '"status": "complete"' "$1" ;;
        # A folder of gradients gets its index last.
        *) [ -e "$1" ] ;;
    esac
}

# A list between colons: bash 3.2, which macOS has, knows no associative arrays, and takes an empty array for an unset one.
printed=:
run() { # the file that says whether it is done, and a command of Python
    local file=$1
    shift
    case $printed in *:"$file":*) return ;; esac
    if finished "$file"; then return; fi
    printed+=$file:
    if [ $dry_run = yes ]; then
        printf '%q ' python "$@"
        echo
    else
        python "$@"
    fi
}

gradients() { # samples, seed, norm
    local folder=gradients/$name-n$1-seed$2
    path=$folder/llama$LLAMA_VERSION/gradients_aggregrate_norm_$3_model_$name
    run "$path/index.json" gradient_computation.py --model "$MODEL" --llama_version "$LLAMA_VERSION" \
        --nsamples "$1" --seed "$2" --norms "$3" --output_dir "$folder" ${common[@]+"${common[@]}"}
}

prune() { # method, pattern, share to remove, samples, seed, norm, alpha
    local save=out/$name/$1-${2/:/-}-$3-n$4-seed$5${6:+-$6}${7:+-alpha$7} using=()
    case $1 in
        gradient | gblm)
            gradients "$4" "$5" "$6"
            using=(--gradient_path "$path")
            ;;
    esac
    [ -z "${7:-}" ] || using+=(--alpha "$7")
    [ "$2" != unstructured ] || using+=(--sparsity_ratio "$3")
    run "$save/results.json" main.py --model "$MODEL" --prune_method "$1" --sparsity_type "$2" ${using[@]+"${using[@]}"} \
        --nsamples "$4" --seed "$5" --save "$save" ${common[@]+"${common[@]}"} ${pruning[@]+"${pruning[@]}"}
}

every_method() { # pattern, share to remove
    for method in magnitude wanda gradient gblm sparsegpt; do
        case $method in
            gradient | gblm) prune $method "$1" "$2" "$NSAMPLES" 0 l2 ;;
            *) prune $method "$1" "$2" "$NSAMPLES" 0 "" ;;
        esac
    done
}

if [ $dry_run = no ]; then
    source scripts/environment.sh
    if [ "$MODEL" = demo/SmolLM2-135M-Instruct ]; then python scripts/fetch_demo.py; fi
fi
for table in $TABLES; do
    case $table in
        methods) for pattern in unstructured 4:8 2:4; do every_method $pattern 0.5; done ;;
        sparsity) for ratio in 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8; do every_method unstructured $ratio; done ;;
        samples)
            for n in $SAMPLES; do
                prune wanda unstructured 0.5 "$n" 0 ""
                prune gblm unstructured 0.5 "$n" 0 l2
            done
            ;;
        seeds)
            for seed in $SEEDS; do
                prune wanda unstructured 0.5 "$NSAMPLES" "$seed" ""
                prune gblm unstructured 0.5 "$NSAMPLES" "$seed" l2
            done
            ;;
        norms) for norm in l1 l2; do for method in gradient gblm; do prune $method unstructured 0.5 "$NSAMPLES" 0 $norm; done; done ;;
        alpha) for alpha in $ALPHAS; do prune gblm unstructured 0.5 "$NSAMPLES" 0 l2 "$alpha"; done ;;
        *)
            echo "paper_tables.sh: error: table $table is not one of methods, sparsity, samples, seeds, norms, alpha" >&2
            exit 2
            ;;
    esac
done
