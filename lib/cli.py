"""What the two commands share: the flags about model, data and device, and the set-up of the log."""

import argparse
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from datasets.utils import disable_progress_bars as disable_data_progress_bars
from transformers.utils.logging import disable_progress_bar as disable_model_progress_bars

from lib import files, parallel
from lib.data import sources, windows
from lib.evaluation.perplexity import windows_of
from lib.gradients.folder import GradientNorms
from lib.models import fetch, loading, memory, store
from lib.models.decoder import Decoder

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]


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


def start(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if any, and set up the log; returns this process' device.

    Raises:
        ValueError: fewer samples than processes.
    """
    device = parallel.start(loading.resolve_device(args.device))
    set_up_logging()
    if args.nsamples < parallel.world():
        raise ValueError(f"--nsamples {args.nsamples} for {parallel.world()} processes: give each at least one")
    return device


def open_model(args: argparse.Namespace) -> tuple[Decoder, Any]:
    """The model's outline and its tokenizer. `args.folder` becomes where it is on this machine, as yet without its weights.

    Raises:
        FileNotFoundError, ValueError: see `fetch.folder`, `loading.outline`, `check_length`.
    """
    args.folder = fetch.folder(args.model, revision=args.revision, cache_dir=args.cache_dir)
    outline = loading.outline(args.folder, trust_remote_code=args.trust_remote_code)
    check_length(args, outline)
    return outline, loading.load_tokenizer(args.folder, trust_remote_code=args.trust_remote_code)


def check_length(args: argparse.Namespace, outline: Decoder) -> None:
    """Raise ValueError if a window has more positions than the model; warn if the model was not trained on so many."""
    positions, learned = loading.positions(outline)
    if positions is None or args.seq_length <= positions:
        return
    if learned:
        raise ValueError(f"--seq_length {args.seq_length} is beyond the {positions} positions {args.model} has: shorten it")
    logger.warning(
        "--seq_length %d is beyond the %d positions %s was made for (max_position_embeddings): perplexity and masks suffer",
        args.seq_length, positions, args.model,
    )  # fmt: skip


def load(args: argparse.Namespace, device: torch.device, outline: Decoder, **needs) -> tuple[Decoder, memory.Plan]:
    """Load the model, in memory or streamed as `memory.plan` decides; `needs` is what that has to know of the command."""
    chosen = memory.plan(
        outline,
        memory=args.memory,
        dtype=args.dtype,
        device=device,
        seq_length=args.seq_length,
        activation_memory=args.activation_memory,
        **needs,
    )
    decoder = load_weights(args, device, chosen.streamed)
    logger.info("%s: %d blocks in %s on %s", args.model, len(decoder), decoder.model.dtype, decoder.device)
    chosen = chosen.measured(decoder)
    if decoder.skipped:
        logger.warning("blocks %s stay dense: %s runs text without them", sorted(decoder.skipped), args.model)
    return decoder, chosen


def load_weights(args: argparse.Namespace, device: torch.device, streamed: bool = False) -> Decoder:
    """The model that `open_model` has outlined."""
    fetch.folder(args.model, revision=args.revision, cache_dir=args.cache_dir, weights=True)
    return loading.load(
        args.folder, dtype=args.dtype, device=device, streamed=streamed, trust_remote_code=args.trust_remote_code
    )


def settle_bos(args: argparse.Namespace, outline: Decoder, tokenizer) -> None:
    """Make `args.bos` what it means for this model, "first" or "every"."""
    family = outline.model.config.model_type
    if args.bos == "auto":
        args.bos = "every" if loading.needs_bos(outline) else "first"
        if args.bos == "every":
            logger.info("--bos every: %s models need BOS before every window", family)
    if args.bos == "every" and tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer of this {family} model has no BOS token to put before every window: use --bos first")


def read_calibration(args: argparse.Namespace, tokenizer) -> torch.Tensor:
    """The calibration windows (n, T) that the flags ask for; `settle_bos` comes first."""
    docs = sources.documents(args.dataset, args.data_dir, cache_dir=args.cache_dir, column=args.text_column)
    return windows.calibration_windows(
        docs, tokenizer, args.nsamples, args.seq_length, args.seed, args.pack, source=args.dataset, bos=_bos(args, tokenizer)
    )


def read_evaluation(args: argparse.Namespace, tokenizer, source: str) -> torch.Tensor:
    """The windows (m, T) that a perplexity on `source` is measured on; `settle_bos` comes first."""
    bos = _bos(args, tokenizer)
    docs = sources.documents(source, args.data_dir, "evaluation", args.cache_dir, args.text_column)
    found = windows_of(windows.evaluation_tokens(docs, tokenizer, source, bos), args.seq_length, bos)
    return found[: windows.EVALUATION_WINDOWS.get(source)]


def _bos(args: argparse.Namespace, tokenizer) -> int | None:
    return tokenizer.bos_token_id if args.bos == "every" else None


def check_vocabulary(args: argparse.Namespace, outline: Decoder, tokenizer, *texts: torch.Tensor | None) -> None:
    """Raise ValueError if windows hold ids that the model has no embedding for; warn if only the tokenizer has such ids."""
    embeddings = outline.model.get_input_embeddings().weight.shape[0]
    used = max(int(tokens.max()) for tokens in texts if tokens is not None)
    known = max(tokenizer.get_vocab().values())
    if used >= embeddings:
        raise ValueError(
            f"the text has token ids up to {used} by this tokenizer ({type(tokenizer).__name__}), but {args.model} only "
            f"{embeddings} embeddings: use the model's own tokenizer, or text without the tokens that were added to it"
        )
    if known >= embeddings:
        logger.warning(
            "the tokenizer (%s) has token ids up to %d, but %s only %d embeddings; the text has none of the ids beyond them",
            type(tokenizer).__name__, known, args.model, embeddings,
        )  # fmt: skip


def compare_samples(args: argparse.Namespace, gradients: GradientNorms) -> None:
    """Warn if the gradients are not from the samples that these flags draw."""
    recorded = {"text_column": None, "bos": "first", **gradients.index}  # neither is in older folders and published files
    for flag in ("nsamples", "seq_length", "seed", "dataset", "pack", "text_column", "bos"):
        there, here = recorded.get(flag, getattr(args, flag)), getattr(args, flag)
        if there != here:
            logger.warning(
                "the gradients were computed with --%s %s, the activations will be with %s: run gradient_computation.py "
                "with the same flags to have both from the same samples", flag, there, here,
            )  # fmt: skip


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


def run(parse: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a command. What this project refuses ends in one line; an error from elsewhere keeps its traceback."""
    try:
        with _signals_unwind():
            main(parse())
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if ROOT not in raised_in.parents or "site-packages" in raised_in.relative_to(ROOT).parts:
            raise
        sys.exit(f"{_command()}: error: {error}")


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """A run that is told to end leaves through its `finally`s, so that nothing half-written stays: status 128 + the signal."""

    def end(number: int, frame) -> None:
        for signum in before:
            signal.signal(signum, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        print(f"{_command()}: ended by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: not all
    before = {signum: signal.getsignal(signum) for signum in found}
    before = {signum: handler for signum, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    try:
        for signum in before:
            signal.signal(signum, end)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _command() -> str:
    return Path(sys.argv[0]).name


def set_up_logging() -> None:
    """Log lines to standard error, so that standard output is the result; of several processes only the first one's."""
    logging.basicConfig(
        level=logging.INFO if parallel.rank() == 0 else logging.ERROR,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for name in ("httpx", "httpcore", "accelerate", "fsspec", "filelock", "matplotlib", "fontTools", "lm_eval"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("datasets", "transformers", "huggingface_hub"):  # which print their lines themselves: here once, as all others
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING)
        library.handlers.clear()
        library.propagate = True
    logging.captureWarnings(True)
    if not sys.stderr.isatty():
        disable_model_progress_bars()
        disable_data_progress_bars()
