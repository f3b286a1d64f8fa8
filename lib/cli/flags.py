"""The flags that commands share, their checks, and the form that --help and errors have."""

import argparse
import math
import os
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from lib import atomic
from lib.data import sources
from lib.errors import InvalidInput, NoRoom, Refusal
from lib.models import loading
from lib.models.files import fetch, pruned_checkpoint


class Parser(argparse.ArgumentParser):
    """Whose errors are one line: a dozen lines of usage would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


class Groups(NamedTuple):
    """The groups that `--help` shows the flags in. The published code's own come first."""

    published: argparse._ArgumentGroup
    model: argparse._ArgumentGroup
    data: argparse._ArgumentGroup
    method: argparse._ArgumentGroup
    beyond: argparse._ArgumentGroup
    evaluation: argparse._ArgumentGroup
    memory: argparse._ArgumentGroup
    output: argparse._ArgumentGroup


TITLES = {"published": "as in the published code", "beyond": "beyond the paper"}  # of groups that are not called as they are


def parser_of(docstring: str, required: str = "--model MODEL") -> tuple[argparse.ArgumentParser, Groups]:
    """A parser described by a command's module docstring (what it does, an example, a remark), and its groups of flags.

    `required` are the flags that the usage line names: with all of them it would hide the error below it.
    """
    description, _, epilog = docstring.partition("\n\n")
    parser = Parser(
        usage=f"%(prog)s {required} [flags]",
        description=description,
        epilog=f"example:\n{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # launchers read flags too, and know them by their whole names
    )
    return parser, Groups(*(parser.add_argument_group(TITLES.get(name, name)) for name in Groups._fields))


def add_common_flags(groups: Groups) -> None:
    """The flags that mean the same to main.py and gradient_computation.py."""
    add = groups.published.add_argument
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--nsamples", type=at_least(1), default=128, metavar="N", help="number of calibration samples (default: %(default)s)")
    add(
        "--seq_length",
        type=at_least(2),  # a window of one token has no target
        default=2048,
        metavar="T",
        help="tokens in a calibration sample and in an evaluation window (default: %(default)s)",
    )
    add(
        "--seed",
        type=at_least(),
        default=0,
        help="random seed for drawing the calibration samples; with the same seed both commands draw the same samples "
        "(default: %(default)s)",
    )
    add("--cache_dir", metavar="DIR", help="where downloads are kept (default: the hub's own cache)")

    add = groups.model.add_argument
    add("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes in the model's own folder")
    add(
        "--dtype",
        choices=["auto", *loading.DTYPES],
        default="auto",
        help="number format to compute in; auto: the checkpoint's own on a GPU, bfloat16 on a CPU that has instructions for it, "
        "else float32",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")

    add = groups.data.add_argument
    add(
        "--dataset",
        default="c4",
        metavar="TEXT",
        help="calibration text: c4, wikitext2, a .txt, .jsonl, .json or .parquet file, or a folder or pattern of such files "
        "(default: %(default)s)",
    )
    add(
        "--text_column",
        metavar="NAME",
        help="the column that holds the text or the chats in the rows of a file (default: text, or else messages)",
    )
    add(
        "--bos",
        choices=["auto", "first", "every"],
        default="auto",
        help="first: BOS where the tokenizer puts it, once before a text; every: BOS before every window; auto: every for Gemma, "
        "else first, as published (default: %(default)s)",
    )
    add(
        "--pack",
        action="store_true",
        help="join calibration documents with EOS and cut the result into samples; for documents shorter than a sample",
    )
    add("--data_dir", metavar="DIR", help="folder to read c4 and wikitext2 from, laid out as on the hub")


def add_memory_flags(groups: Groups) -> None:
    """What `memory.plan` needs to know."""
    groups.memory.add_argument(
        "--memory",
        choices=["auto", "resident", "streamed"],
        default="auto",
        help="streamed: keep one block at a time in memory and the others on disk; auto: resident if the model and what the run "
        "needs beside it fit",
    )
    groups.memory.add_argument(
        "--activation_memory",
        type=number_above(0),
        metavar="GB",
        help="memory for hidden states, which go to a file beyond it (default: a quarter of the free memory)",
    )


def add_selection_flags(parser: argparse._ActionsContainer) -> None:
    """The patterns of `targets.select`."""
    example = '"*.o_proj" matches model.layers.0.self_attn.o_proj'
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help=f"prune only linears whose names match: {example}"
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="do not prune linears whose names match, even if --include does",
    )


def check_common_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if a shared flag cannot work."""
    try:
        fetch.check_name(args.model, args.revision)
        loading.resolve_device(args.device)
        sources.check_source(args.dataset, args.data_dir)
    except Refusal as error:
        parser.error(str(error))


def check_save_model(args: argparse.Namespace) -> None:
    """Refuse a --save_model that would replace weights that are not this project's, or cannot be written."""
    if args.save_model and os.path.realpath(args.save_model) == os.path.realpath(args.model):
        raise InvalidInput("--save_model is the folder of --model: its weights would be lost, choose another")
    if args.save_model and (foreign := pruned_checkpoint.foreign_weights(args.save_model)):
        raise InvalidInput(f"--save_model would replace {foreign}, which this project has not written: choose another folder")
    if args.save_model:
        check_writable("--save_model", args.save_model)


def check_writable(flag: str, folder: str) -> None:
    """Raise NoRoom if results cannot go to a folder."""
    try:
        atomic.check_writable(folder)
    except OSError as error:
        raise NoRoom(f"{flag} cannot be written: {error}: choose another folder") from error


def at_least(lowest: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer, not below `lowest`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as {lowest or 0}") from None
        if lowest is not None and value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is not above {lowest - 1}: give a whole number of at least {lowest}")
        return value

    return read


def number_above(lowest: float, including: bool = False, highest: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number above `lowest` (or `including` it), not above `highest`."""
    bounds = f"{'of at least' if including else 'above'} {lowest:g}"
    bounds += "" if highest == math.inf else f" and at most {highest:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number: give one {bounds}")
        if value > highest or value < lowest or (value == lowest and not including):
            wrong = f"not above {lowest:g}" if value <= lowest else "too large"
            raise argparse.ArgumentTypeError(f"{text} is {wrong}: give a number {bounds}")
        return value

    return read
