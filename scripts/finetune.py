"""Train a pruned model for a few steps to lower its perplexity; its zeros stay.

    python scripts/finetune.py --model out/gblm/model --save_model out/tuned \\
        --dataset demo/calibration.jsonl --eval_dataset demo/evaluation.jsonl \\
        --seq_length 512 --lora 16

Weights are trained in float32, and products are computed in --dtype. With
--lora the adapters are masked like the weights, and added to them at the end.
The result is a checkpoint like those of main.py, with the dtypes and files of
--model.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.cli.open import check_vocabulary, open_model, read_calibration, read_evaluation
from lib.data import sources
from lib.errors import Refusal
from lib.evaluation.perplexity import perplexity
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files import fetch, pruned_checkpoint
from lib.models.recovery import KeepZeros, add_adapters

RATES = {"full": 1e-4, "LoRA": 1e-3}  # learning rates: usual ones, not tuned on any model


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser, groups = flags.parser_of(__doc__, "--model PRUNED --save_model DIR")
    flags.add_common_flags(groups)
    groups.data.add_argument(
        "--eval_dataset",
        default="wikitext2",
        metavar="TEXT",
        help="text to measure perplexity on, before and after training (default: %(default)s)",
    )
    add = groups.method.add_argument
    add("--lora", type=flags.at_least(1), metavar="RANK", help="train adapters of this rank instead of all weights")
    add("--steps", type=flags.at_least(1), default=60, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--batch_size", type=flags.at_least(1), default=4, metavar="N", help="samples in a step (default: %(default)s)")
    rates = ", ".join(f"{rate:g} for {name} training" for name, rate in RATES.items())
    add(
        "--learning_rate",
        type=flags.number_above(0),
        metavar="RATE",
        help=f"learning rate at the start, from where it falls to 0 (default: {rates})",
    )
    groups.output.add_argument("--save_model", required=True, metavar="DIR", help="folder for the trained checkpoint")
    args = parser.parse_args(argv)
    flags.check_common_flags(parser, args)
    if args.learning_rate is None:
        args.learning_rate = RATES["LoRA" if args.lora else "full"]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("this script runs in one process: start it with python")
    if loading.resolve_device(args.device).type == "cuda" and torch.cuda.device_count() > 1:
        parser.error(
            f"this script uses one GPU, and {torch.cuda.device_count()} are visible: set CUDA_VISIBLE_DEVICES to its number"
        )
    try:
        flags.check_save_model(args)
        sources.check_source(args.eval_dataset, args.data_dir, "evaluation")
    except Refusal as error:
        parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, train, save, measure what was saved."""
    device = command.start(args.device, args.nsamples)
    outline = open_model(args)
    windows = read_calibration(args, outline)
    evaluation = read_evaluation(args, outline, args.eval_dataset)
    check_vocabulary(args, outline, windows, evaluation)

    def load(folder: str, dtype: str) -> Decoder:
        return loading.load(folder, dtype=dtype, device=device, trust_remote_code=args.trust_remote_code)

    fetch.folder(args.model, revision=args.revision, cache_dir=args.cache_dir, weights=True)
    before = perplexity(load(outline.folder, args.dtype), evaluation)
    print(f"perplexity {before:.4f} before training", flush=True)
    decoder = load(outline.folder, "float32")
    dense = loading.dense_tensors(outline.folder, decoder)
    store = pruned_checkpoint.Store(args.save_model, dense, updated=True)
    with contextlib.ExitStack() as unfinished:
        unfinished.callback(store.discard)
        keep = KeepZeros(decoder)
        train(decoder, keep, windows, args)
        keep.keep_others(dense)
        state = decoder.model.state_dict()
        store.write(state, [name for name in state if name in dense.group_of])
        store.finish()
    del decoder, keep, store
    gc.collect()
    after = perplexity(load(args.save_model, args.dtype), evaluation)
    zeros, total = same_zeros(outline.folder, args.save_model, args.trust_remote_code)
    print(f"sparsity {zeros / total:.4f}, the same {zeros} zeros before and after")
    print(f"perplexity {after:.4f} after training ({before:.4f} before) on {args.eval_dataset}, {len(evaluation)} windows")
    print(f"checkpoint saved in {args.save_model}")


def train(decoder: Decoder, keep: KeepZeros, windows: torch.Tensor, args: argparse.Namespace) -> None:
    """Train a model in place on windows (n, T)."""
    model = add_adapters(decoder, keep, args.lora) if args.lora else decoder.model.requires_grad_(True)
    dtype = loading.resolve_dtype(args.dtype, decoder.model.config, decoder.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, args.steps // 10),
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=decoder.device.type == "cpu",
            dataloader_pin_memory=False,
            seed=args.seed,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
        )
        samples = [{"input_ids": window, "labels": window} for window in windows]
        Trainer(model, arguments, train_dataset=samples, callbacks=[keep]).train()
    if args.lora:
        model.merge_and_unload()
    decoder.model.eval().requires_grad_(False)


def same_zeros(before: str, after: str, trust_remote_code: bool = False) -> tuple[int, int]:
    """How many zeros, and how many weights, the blocks' matrices of two checkpoints have.

    Raises:
        RuntimeError: the zeros of a matrix are not the same in both.
    """
    one, other = (loading.on_disk(name, trust_remote_code=trust_remote_code) for name in (before, after))
    zeros = total = 0
    for i, prefix in enumerate(one.prefixes):
        for name in sorted({f"{prefix}{matrix.tensor_name}" for matrix in one.linears(i).values()}):
            mask = one.source[name] == 0
            if not torch.equal(mask, other.source[name] == 0):
                raise RuntimeError(f"{name} has other zeros after training than before: this should not be possible")
            zeros, total = zeros + torch.count_nonzero(mask).item(), total + mask.numel()
    return zeros, total


if __name__ == "__main__":
    command.run(parse, main)
