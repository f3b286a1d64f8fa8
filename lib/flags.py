"""The flags that commands share, their checks, and the form that --help and errors have."""

import argparse
import math
import os
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from lib import files
from lib.data import sources
from lib.models import fetch, loading, store


class Parser(argparse.ArgumentParser):
    """Whose errors are one line: a dozen lines of usage would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


class Groups(NamedTuple):
    """The groups that `--help` shows the flags in."""

    model: argparse._ArgumentGroup
    data: argparse._ArgumentGroup
    method: argparse._ArgumentGroup
    evaluation: argparse._ArgumentGroup
    memory: argparse._ArgumentGroup
    output: argparse._ArgumentGroup


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
    )
    return parser, Groups(*(parser.add_argument_group(name) for name in Groups._fields))


def add_common_flags(groups: Groups) -> None:
    """The flags that mean the same to main.py and gradient_computation.py."""
    add = groups.model.add_argument
    add("--model", required=True, help="folder or hub name of a causal language model")
    add("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    add("--trust_remote_code", action="store_true", help="run the code that a model's own folder brings")
    add("--cache_dir", metavar="DIR", help="where downloads are kept (default: the hub's own cache)")
    add(
        "--dtype",
        choices=["auto", *loading.DTYPES],
        default="auto",
        help="to compute in; auto: the checkpoint's on a GPU, bfloat16 on a CPU with instructions for it, else float32",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")

    add = groups.data.add_argument
    add("--nsamples", type=at_least(1), default=128, metavar="N", help="calibration samples (default: %(default)s)")
    add(
        "--seq_length",
        type=at_least(2),  # a window of one token has no target
        default=2048,
        metavar="T",
        help="tokens of a sample and of an evaluation window (default: %(default)s)",
    )
    add(
        "--seed",
        type=at_least(),
        default=0,
        help="of the calibration samples; both commands draw the same (default: %(default)s)",
    )
    add(
        "--dataset",
        default="c4",
        metavar="TEXT",
        help="calibration text: c4, wikitext2, or a .txt, .jsonl, .json or .parquet file, a folder or a pattern of them "
        "(default: %(default)s)",
    )
    add("--text_column", metavar="NAME", help="of files' rows, holds their text or chats (default: text, or else messages)")
    add(
        "--bos",
        choices=["auto", "first", "every"],
        default="auto",
        help="first: where the tokenizer puts BOS, once before a text; every: before every window; auto: every for Gemma, "
        "else first, as published (default: %(default)s)",
    )
    add("--pack", action="store_true", help="join calibration documents with EOS and cut, for short documents")
    add("--data_dir", metavar="DIR", help="read c4 and wikitext2 from this folder, laid out as on the hub")


def add_memory_flags(groups: Groups) -> None:
    """What `memory.plan` needs to know."""
    groups.memory.add_argument(
        "--memory",
        choices=["auto", "resident", "streamed"],
        default="auto",
        help="streamed: one block at a time in memory, the others on disk; auto: resident if the model and its working set fit",
    )
    groups.memory.add_argument(
        "--activation_memory",
        type=number_above(0),
        metavar="GB",
        help="for kept hidden states (default: a quarter of the free memory)",
    )


def add_selection_flags(parser: argparse._ActionsContainer) -> None:
    """The patterns of `selection.select`."""
    example = '"*.o_proj" matches model.layers.0.self_attn.o_proj'
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help=f"only these linears: {example}")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="not these linears, even if included")


def check_common_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if a shared flag cannot work."""
    try:
        fetch.check_name(args.model, args.revision)
        loading.resolve_device(args.device)
        sources.check_source(args.dataset, args.data_dir)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def check_save_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with `parser.error` if --save_model would replace weights that are not this project's."""
    if args.save_model and os.path.realpath(args.save_model) == os.path.realpath(args.model):
        parser.error("--save_model is the folder of --model: its weights would be lost, choose another")
    if args.save_model and (foreign := store.foreign_weights(args.save_model)):
        parser.error(f"--save_model would replace {foreign}, which this project has not written: choose another folder")
    try:
        if args.save_model:
            files.check_writable(args.save_model)
    except OSError as error:
        parser.error(f"--save_model cannot be written: {error}: choose another folder")


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
