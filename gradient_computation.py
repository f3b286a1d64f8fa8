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

from lib import parallel
from lib.cli import command, flags
from lib.cli.open import Outline, check_vocabulary, load, open_model, read_calibration
from lib.errors import Refusal
from lib.gradients.folder import GradientNorms, GradientWriter, folder_of, scales_of
from lib.gradients.resume import GradientWork
from lib.gradients.walk import NORMS, SCALE, gradient_norms
from lib.models import fingerprint, loading, memory
from lib.models.decoder import Decoder
from lib.results import record
from lib.results.phases import Phases

logger = logging.getLogger("gradient_computation")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser, groups = flags.parser_of(__doc__)
    flags.add_common_flags(groups)
    flags.add_memory_flags(groups)
    groups.published.add_argument(
        "--scale",
        type=flags.number_above(0),
        default=SCALE,
        help="factor that gradients are multiplied with before their norms are taken and stored (default: %(default)g)",
    )
    groups.published.add_argument(
        "--llama_version",
        type=int,
        choices=(1, 2),
        default=2,
        help="chooses the name of the output folder, gradients/llama1 or gradients/llama2 (default: %(default)s)",
    )
    groups.method.add_argument(
        "--norms",
        nargs="+",
        choices=NORMS,
        default=list(NORMS),
        help="which norms to store: l1 is sum |G|, l2 is sqrt(sum G^2) (default: both)",
    )
    groups.output.add_argument(
        "--norm_dtype",
        choices=("float16", "float32"),
        default="float16",
        help="number format of the stored norms; float32 takes twice the space, and no norm underflows or overflows in it "
        "(default: %(default)s)",
    )
    groups.output.add_argument(
        "--output_dir",
        default="gradients",
        metavar="DIR",
        help="folder that the folders of norms are written to (default: %(default)s)",
    )
    groups.output.add_argument("--resume", action="store_true", help="continue a run with the same flags that was stopped")
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
        flags.check_writable("--output_dir", args.output_dir)
    except Refusal as error:
        parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    """Read text and model, add up the gradients over all samples, and write one folder for each norm."""
    device = command.start(args.device, args.nsamples)
    norms = tuple(sorted(set(args.norms)))
    outline = open_model(args)
    windows = read_calibration(args, outline)
    check_vocabulary(args, outline, windows)
    logger.info("%d samples of %d tokens from %s", *windows.shape, args.dataset)
    share, first = parallel.share(windows), parallel.share(torch.arange(len(windows)))[0].item()
    decoder, plan = load(args, device, outline, memory.Needs(sums_per_weight=4 * len(norms), graph=True))

    provenance = provenance_of(args, outline, decoder)
    folders = {norm: folder_of(args.output_dir, args.llama_version, norm, args.model) for norm in norms}
    for folder in folders.values() if parallel.rank() == 0 else ():
        point_out_earlier(folder, provenance, decoder)
    settings = {
        **provenance,
        "norms": list(norms),
        "memory": "streamed" if plan.streamed else "resident",
        "windows": checksum(share),
        "weights": fingerprint.checksum(decoder),
    }
    name = folder_of(args.output_dir, args.llama_version, "work", args.model).name
    place = next(iter(folders.values())).with_name(f"{name}.rank{parallel.rank()}")
    with GradientWork(place, settings, device, args.resume) as work, ExitStack() as stack, memory.watched(plan, device):
        if work.done:
            logger.info("continuing after %d of %d samples", work.done, len(share))
        dtype = loading.DTYPES[args.norm_dtype]
        writers = {norm: stack.enter_context(GradientWriter(folder, dtype)) for norm, folder in folders.items()}
        with Phases(device)("gradients"):
            group = plan.group(len(share), len(decoder) + 2) if plan.streamed else None
            for i, sums in gradient_norms(
                decoder, share, norms=norms, scale=args.scale, keep_graph=not plan.streamed, group=group, work=work, first=first
            ):
                few_weights = fingerprint.of_block(decoder, i)
                for norm, writer in writers.items():
                    writer.write_block(i, sums.result(norm), few_weights)
        for norm, writer in writers.items():
            writer.finish({"norm": norm, **provenance, "missing": work.missing})
            if parallel.rank() == 0:
                print(
                    f"{norm} gradient norms saved in {writer.folder} ({writer.total} in {args.norm_dtype}: "
                    f"{writer.underflow} became 0, {writer.overflow} were cut)"
                )
        parallel.stop()
        work.remove()


def provenance_of(args: argparse.Namespace, outline: Outline, decoder: Decoder) -> dict:
    """All that the norms depend on, for the index of their folder."""
    flags = ("model", "nsamples", "seq_length", "scale", "seed", "dataset", "pack", "text_column")
    provenance = {flag: getattr(args, flag) for flag in flags} | {
        "bos": outline.bos,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "processes": parallel.world(),
        "versions": record.versions(),
    }
    return provenance | ({"revision": args.revision} if args.revision else {})


def point_out_earlier(folder: Path, provenance: dict, decoder: Decoder) -> None:
    """Log that this run will overwrite an earlier result, if there is one, and how its model and settings differ."""
    try:
        earlier = GradientNorms(folder)
    except Refusal:  # main.py could not use what is there
        record.point_out_unknown(folder)
        return
    now = {**provenance, "weights": "this model's"}
    before = {key: earlier.index.get(key) for key in provenance}
    record.point_out_earlier(
        folder, {**before, "weights": "this model's" if earlier.is_of(decoder) else "another model's"}, now
    )


def checksum(windows: torch.Tensor) -> str:
    """SHA-256 of the windows, which tells a resumed run whether they are the same."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    command.run(parse, main)
