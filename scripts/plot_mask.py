"""The mask of a linear as an image, with the share each input and output keeps.

    python scripts/plot_mask.py out/gblm/model \\
        --linear model.layers.5.self_attn.q_proj --against out/wanda/model

PNG and PDF. A large matrix is drawn in cells, each the share of its weights
that is kept. With two checkpoints, where they differ is drawn as well.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import command, flags
from lib.errors import InvalidInput
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files import fetch
from lib.results import figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Declare and check the flags; nothing is loaded."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub name of the pruned model")
    parser.add_argument("--linear", required=True, metavar="NAME", help="full name, as model.layers.5.self_attn.q_proj")
    parser.add_argument("--against", metavar="OTHER", help="a second checkpoint, drawn beside it")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="of the checkpoints (default: of their folders)")
    parser.add_argument("--output", default="out/mask", metavar="NAME", help="of NAME.png and NAME.pdf (default: %(default)s)")
    parser.add_argument("--dark", action="store_true", help="also NAME-dark.png and .pdf, for dark pages")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a model's own folder brings")
    parser.add_argument("--cache_dir", metavar="DIR", help="where downloads are kept (default: the hub's own cache)")
    args = parser.parse_args(argv)
    args.checkpoints = [args.checkpoint, *filter(None, [args.against])]
    if args.names and len(args.names) != len(args.checkpoints):
        parser.error(f"--names gives {len(args.names)} for {len(args.checkpoints)} checkpoints")
    try:
        for name in args.checkpoints:
            fetch.check_name(name)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return args


def kept(decoder: Decoder, linear: str) -> np.ndarray:
    """Which weights of a linear are not zero, (out, in).

    Raises:
        ValueError: the model has no such linear.
    """
    names = {}
    for i, prefix in enumerate(decoder.prefixes):
        names |= {prefix + name: (prefix, matrix) for name, matrix in (decoder.linears(i) | decoder.routers(i)).items()}
    if linear not in names:
        raise InvalidInput(
            f"--linear {linear} is not one of the {len(names)} linears: they are called {next(iter(names))} and so on"
        )
    prefix, matrix = names[linear]
    tensor = decoder.source[prefix + matrix.tensor_name]
    return (matrix.oriented(tensor if matrix.index is None else tensor[matrix.index]) != 0).numpy()


def main(args: argparse.Namespace) -> None:
    """Read the masks, say how alike they are, draw them."""
    names = args.names or [_name_of(path) for path in args.checkpoints]
    if len(set(names)) < len(names):
        raise InvalidInput(f"both checkpoints are called {names[0]}: give them --names")
    masks = {}
    for name, path in zip(names, args.checkpoints, strict=True):
        folder = fetch.folder(path, cache_dir=args.cache_dir, weights=True)
        masks[name] = kept(loading.on_disk(folder, trust_remote_code=args.trust_remote_code), args.linear)
        print(f"{name}: {masks[name].mean():.4f} of {args.linear} kept, {masks[name].shape[0]} x {masks[name].shape[1]}")
    first, *others = masks.values()
    for other in others:
        if other.shape != first.shape:
            raise InvalidInput(
                f"{args.linear} is {first.shape} in one checkpoint and {other.shape} in the other: compare one model's"
            )
        print(f"{(first == other).mean():.4f} of the mask's bits are equal")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    width = figures.PAGE if len(masks) > 1 else figures.COLUMN
    themes = ["light", *["dark"] * args.dark]
    for path in figures.save(
        lambda figure: figures.masks(figure, masks), args.output, (width, 3.1 if len(masks) > 1 else 3.6), themes
    ):
        print(path)


def _name_of(checkpoint: str) -> str:
    """Of its folder; of out/wanda/model, as the launchers write it, wanda."""
    path = Path(checkpoint)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


if __name__ == "__main__":
    command.run(parse, main)
