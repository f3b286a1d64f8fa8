"""Gradient norms of a dense model over calibration samples, for main.py.

    python gradient_computation.py --model meta-llama/Llama-2-7b-hf

writes gradients/llama2/gradients_aggregrate_norm_{l1,l2}_model_Llama-2-7b-hf/
for main.py --gradient_path. Every flag is explained in docs/flags.md.
"""

import argparse
import hashlib
import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from lib import entry, files, flags, inputs, parallel, report
from lib.gradients.folder import GradientNorms, GradientWriter, folder_of, scales_of
from lib.gradients.walk import NORMS, SCALE, gradient_norms
from lib.gradients.work import GradientWork
from lib.models import fingerprint, loading
from lib.models.decoder import Decoder

logger = logging.getLogger("gradient_computation")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser, groups = flags.parser_of(__doc__)
    flags.add_common_flags(groups)
    flags.add_memory_flags(groups)
    groups.method.add_argument(
        "--scale",
        type=flags.number_above(0),
        default=SCALE,
        help="factor on the gradients, baked into the stored norms (default: %(default)s)",
    )
    groups.output.add_argument(
        "--llama_version",
        type=int,
        choices=(1, 2),
        default=2,
        help="names the output folder, gradients/llama1 or llama2 (default: %(default)s)",
    )
    groups.method.add_argument(
        "--norms", nargs="+", choices=NORMS, default=list(NORMS), help="l1 is sum |G|, l2 is sqrt(sum G^2) (default: both)"
    )
    groups.output.add_argument(
        "--norm_dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the stored norms; float32 has no underflow or overflow and twice the size (default: %(default)s)",
    )
    groups.output.add_argument(
        "--output_dir", default="gradients", metavar="DIR", help="where the folders of norms go (default: %(default)s)"
    )
    groups.output.add_argument("--resume", action="store_true", help="go on with a run of the same flags that was stopped")
    args = parser.parse_args(argv)
    flags.check_common_flags(parser, args)
    least, largest = scales_of(loading.DTYPES[args.norm_dtype])
    if not least <= args.scale <= largest:
        other = "" if args.norm_dtype == "float32" else ", or add --norm_dtype float32"
        parser.error(
            f"--scale {args.scale:g} is outside {least:.2g} to {largest:.6g}, where a gradient of norm 1 can be stored in "
            f"{args.norm_dtype}: use the published {SCALE:g}{other}"
        )
    try:
        files.check_writable(args.output_dir)
    except OSError as error:
        parser.error(f"--output_dir cannot be written: {error}: choose another folder")
    return args


def main(args: argparse.Namespace) -> None:
    """Windows, model, gradients, folders."""
    device = entry.start(args)
    norms = tuple(sorted(set(args.norms)))
    outline, tokenizer = inputs.open_model(args)
    inputs.settle_bos(args, outline, tokenizer)
    windows = inputs.read_calibration(args, tokenizer)
    inputs.check_vocabulary(args, outline, tokenizer, windows)
    logger.info("%d samples of %d tokens from %s", *windows.shape, args.dataset)
    own, first = parallel.share(windows), parallel.share(torch.arange(len(windows)))[0].item()
    decoder, chosen = inputs.load(args, device, outline, sums_per_weight=4 * len(norms), graph=True)

    provenance = {
        "model": args.model,
        "nsamples": args.nsamples,
        "seq_length": args.seq_length,
        "scale": args.scale,
        "seed": args.seed,
        "dataset": args.dataset,
        "pack": args.pack,
        "text_column": args.text_column,
        "bos": args.bos,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "processes": parallel.world(),
        "versions": report.versions(),
    }
    if args.revision:
        provenance["revision"] = args.revision
    folders = {norm: folder_of(args.output_dir, args.llama_version, norm, args.model) for norm in norms}
    for folder in folders.values() if parallel.rank() == 0 else ():
        point_out_earlier(folder, provenance, decoder)
    settings = {
        **provenance,
        "norms": list(norms),
        "memory": "streamed" if chosen.streamed else "resident",
        "windows": checksum(own),
        "weights": fingerprint.checksum(decoder),
    }
    name = folder_of(args.output_dir, args.llama_version, "work", args.model).name
    place = next(iter(folders.values())).with_name(f"{name}.rank{parallel.rank()}")
    with GradientWork(place, settings, device, args.resume) as work, ExitStack() as stack:
        if work.done:
            logger.info("going on after %d of %d samples", work.done, len(own))
        writers = {}
        for norm, folder in folders.items():
            writers[norm] = stack.enter_context(GradientWriter(folder, loading.DTYPES[args.norm_dtype]))
        with report.Phases(device)("gradients"):
            walk = gradient_norms(
                decoder,
                own,
                norms=norms,
                scale=args.scale,
                keep_graph=not chosen.streamed,
                group=chosen.group(len(own), len(decoder) + 2) if chosen.streamed else None,
                work=work,
                first=first,
            )
            for i, sums in walk:
                few = fingerprint.of_block(decoder, i)
                for norm, writer in writers.items():
                    writer.write_block(i, sums.result(norm), few)
        for norm, writer in writers.items():
            writer.finish({"norm": norm, **provenance, "missing": work.missing})
            if parallel.rank() == 0:
                print(
                    f"{norm} gradient norms saved in {writer.folder} ({writer.total} in {args.norm_dtype}: "
                    f"{writer.underflow} became 0, {writer.overflow} were cut)"
                )
        parallel.stop()
        work.remove()


def point_out_earlier(folder: Path, provenance: dict, decoder: Decoder) -> None:
    """Say what of another model or other settings is replaced by the gradients of this run, if anything is."""
    try:
        earlier = GradientNorms(folder)
    except (FileNotFoundError, ValueError):  # nothing that main.py would use
        report.point_out_unknown(folder)
        return
    now = {**provenance, "weights": "this model's"}
    before = {key: earlier.index.get(key) for key in provenance}
    report.point_out_earlier(
        folder, {**before, "weights": "this model's" if earlier.is_of(decoder) else "another model's"}, now
    )


def checksum(windows: torch.Tensor) -> str:
    """Tells a resumed run that the windows are the same."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    entry.run(parse, main)
