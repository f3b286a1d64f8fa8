"""The mask of a linear as an image, with the shares that inputs and outputs keep.

    python scripts/plot_mask.py out/gblm/model \\
        --linear model.layers.5.self_attn.q_proj --against out/wanda/model

Writes PNG and PDF. A large matrix is drawn in cells, each of which shows the
share of its weights that is kept. Of two checkpoints, a third image shows where
they differ.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.errors import InvalidInput, Refusal
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files import fetch
from lib.results import figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub name of the pruned model")
    parser.add_argument("--linear", required=True, metavar="NAME", help="full name, such as model.layers.5.self_attn.q_proj")
    parser.add_argument("--against", metavar="OTHER", help="second checkpoint, which is drawn beside the first")
    parser.add_argument(
        "--names", nargs="+", default=[], metavar="NAME", help="names for the checkpoints (default: those of their folders)"
    )
    parser.add_argument(
        "--output", default="out/mask", metavar="NAME", help="where to write NAME.png and NAME.pdf (default: %(default)s)"
    )
    parser.add_argument("--dark", action="store_true", help="write NAME-dark.png and NAME-dark.pdf as well, for dark pages")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the Python code that comes in the model's own folder"
    )
    parser.add_argument("--cache_dir", metavar="DIR", help="where downloads are kept (default: the hub's own cache)")
    args = parser.parse_args(argv)
    args.checkpoints = [args.checkpoint, *filter(None, [args.against])]
    if args.names and len(args.names) != len(args.checkpoints):
        parser.error(f"--names gives {len(args.names)} for {len(args.checkpoints)} checkpoints")
    try:
        for name in args.checkpoints:
            fetch.check_name(name)
    except Refusal as error:
        parser.error(str(error))
    return args


def survivors(decoder: Decoder, linear: str) -> np.ndarray:
    """Which weights of a linear are not zero, (out, in).

    Raises:
        InvalidInput: the model has no such linear.
    """
    names = {}
    for i, prefix in enumerate(decoder.prefixes):
        names |= {prefix + name: (prefix, matrix) for name, matrix in (decoder.linears(i) | decoder.routers(i)).items()}
    if linear not in names:
        raise InvalidInput(
            f"--linear {linear} is not one of the {len(names)} linears: they are called {next(iter(names))} and so on"
        )
    prefix, matrix = names[linear]
    return (matrix.of(decoder.source[prefix + matrix.tensor_name]) != 0).numpy()


def main(args: argparse.Namespace) -> None:
    """Read which weights survive, print how alike the checkpoints are, and draw them."""
    names = args.names or [_name_of(checkpoint) for checkpoint in args.checkpoints]
    if len(set(names)) < len(names):
        raise InvalidInput(f"both checkpoints are called {names[0]}: give them --names")
    by_name = {}
    for name, checkpoint in zip(names, args.checkpoints, strict=True):
        folder = fetch.folder(checkpoint, cache_dir=args.cache_dir, weights=True)
        weights = survivors(loading.on_disk(folder, trust_remote_code=args.trust_remote_code), args.linear)
        print(f"{name}: {weights.mean():.4f} of {args.linear} kept, {weights.shape[0]} x {weights.shape[1]}")
        by_name[name] = weights
    first, *others = by_name.values()
    for other in others:
        if other.shape != first.shape:
            raise InvalidInput(
                f"{args.linear} is {first.shape} in one checkpoint and {other.shape} in the other: compare one model's"
            )
        print(f"{(first == other).mean():.4f} of the mask's bits are equal")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    size = (figures.PAGE, 3.1) if len(by_name) > 1 else (figures.COLUMN, 3.6)
    themes = ["light", *["dark"] * args.dark]
    print(*figures.save(lambda figure: figures.masks(figure, by_name), args.output, size, themes), sep="\n")


def _name_of(checkpoint: str) -> str:
    """The name of a checkpoint's folder; for out/wanda/model, as the launchers call it, "wanda"."""
    path = Path(checkpoint)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


if __name__ == "__main__":
    command.run(parse, main)
