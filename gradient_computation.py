"""Gradient norms of a dense model over calibration samples, the file between the two commands.

    python gradient_computation.py --model meta-llama/Llama-2-7b-hf --llama_version 2 --nsamples 128

writes gradients/llama2/gradients_aggregrate_norm_{l1,l2}_model_Llama-2-7b-hf/ for `main.py --gradient_path`.
"""

import argparse
import logging

from lib import cli, data, loading, report
from lib.gradient_folder import GradientWriter, folder_of
from lib.gradients import NORMS, SCALE, gradient_norms

logger = logging.getLogger("gradient_computation")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser = argparse.ArgumentParser(description="Accumulate per-weight gradient norms over calibration samples.")
    cli.add_common_flags(parser)
    parser.add_argument(
        "--scale", type=float, default=SCALE, help="factor on the gradients, baked into the stored norms (default: %(default)s)"
    )
    parser.add_argument(
        "--llama_version",
        type=int,
        choices=(1, 2),
        default=2,
        help="names the output folder, gradients/llama1 or llama2 (default: %(default)s)",
    )
    parser.add_argument(
        "--norms", nargs="+", choices=NORMS, default=list(NORMS), help="l1 is sum |G|, l2 is sqrt(sum G^2) (default: both)"
    )
    parser.add_argument("--output_dir", default="gradients", help="default: %(default)s")
    args = parser.parse_args(argv)
    cli.check_common_flags(parser, args)
    if not args.scale > 0:
        parser.error(f"--scale {args.scale} must be above 0")
    try:
        report.check_writable(args.output_dir)
    except OSError as error:
        parser.error(f"--output_dir cannot be written: {error}")
    return args


def main(args: argparse.Namespace) -> None:
    """Windows, model, gradients, folders."""
    tokenizer = loading.load_tokenizer(args.model, args.cache_dir)
    docs = data.documents(args.dataset, args.data_dir, cache_dir=args.cache_dir)
    windows = data.calibration_windows(docs, tokenizer, args.nsamples, args.seq_length, args.seed, args.pack)
    logger.info("%d samples of %d tokens from %s", *windows.shape, args.dataset)
    decoder = loading.load(args.model, dtype=args.dtype, device=args.device, cache_dir=args.cache_dir)
    logger.info("%s: %d blocks in %s on %s", args.model, len(decoder), decoder.model.dtype, decoder.device)

    norms = tuple(sorted(set(args.norms)))
    writers = {norm: GradientWriter(folder_of(args.output_dir, args.llama_version, norm, args.model)) for norm in norms}
    phases = report.Phases(decoder.device)
    with phases("gradients"):
        for i, sums in gradient_norms(decoder, windows, norms=norms, scale=args.scale):
            fingerprint = decoder.fingerprint(i)
            for norm, writer in writers.items():
                writer.write_block(i, sums.result(norm), fingerprint)
    provenance = {
        "model": args.model,
        "nsamples": args.nsamples,
        "seq_length": args.seq_length,
        "scale": args.scale,
        "seed": args.seed,
        "dataset": args.dataset,
        "pack": args.pack,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "versions": report.versions(),
        **phases.record["gradients"],
    }
    for norm, writer in writers.items():
        writer.finish({"norm": norm, **provenance})
        print(f"{norm} gradient norms saved in {writer.folder}")


if __name__ == "__main__":
    arguments = parse()
    cli.set_up_logging()
    main(arguments)
