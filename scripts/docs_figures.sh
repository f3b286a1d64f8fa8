#!/usr/bin/env bash
# The figures of the documents, docs/figures/, and the rows behind those of the demo model and text, docs/results/demo.jsonl.
#   bash scripts/docs_figures.sh
# About an hour on two idle cores. A row that is there is not computed again: a run that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

name=SmolLM2-135M-Instruct
gradients=gradients/llama2/gradients_aggregrate_norm_l2_model_$name
bash run_gblm_prune.sh --save out/docs/gblm --save_model out/docs/gblm/model
bash run_gblm_prune.sh --prune_method wanda --save out/docs/wanda --save_model out/docs/wanda/model
python scripts/plot_mask.py out/docs/gblm/model --linear model.layers.5.self_attn.o_proj --against out/docs/wanda/model \
    --output docs/figures/mask --dark

rows() {
    python scripts/table.py --model demo/$name --dataset demo/calibration.jsonl --eval_dataset demo/evaluation.jsonl \
        --nsamples 16 --seq_length 512 --gradient_path "$gradients" --output docs/results/demo.jsonl "$@"
}
rows --patterns unstructured --ratios 0.5 0.3 0.7 0.6 0.4 0.2 0.8 0.1
rows --methods wanda --recipes fast best max --patterns unstructured --ratios 0.5 0.7 0.6 0.3 0.8 0.4 0.2 0.1
for results in smollm2-135m-c4 demo; do  # perplexity against alpha, and against sparsity
    python scripts/plot_results.py docs/results/$results.jsonl --output docs/figures --dark
done
