"""How a command begins and ends: its processes, its log, one line for what this project refuses, a clean end by a signal."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets.utils import disable_progress_bars as disable_data_progress_bars
from transformers.utils.logging import disable_progress_bar as disable_model_progress_bars

from lib import parallel
from lib.errors import InvalidInput, Refusal
from lib.models import loading

logger = logging.getLogger(__name__)


def run(parse: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a command. What this project refuses ends in one line; every other error keeps its traceback."""
    try:
        with _signals_unwind():
            main(parse())
    except Refusal as error:
        sys.exit(f"{_command()}: error: {error}")


def start(device: str, nsamples: int) -> torch.device:
    """Join the other processes, if any, and set up the log; returns this process' device.

    Raises:
        InvalidInput: fewer samples than processes.
    """
    place = parallel.start(loading.resolve_device(device))
    set_up_logging()
    if nsamples < parallel.world():
        raise InvalidInput(f"--nsamples {nsamples} for {parallel.world()} processes: give each at least one")
    return place


@contextmanager
def beside(error: BaseException) -> Iterator[None]:
    """What is done while `error` is on its way out does not hide it: a failure here is only logged."""
    try:
        yield
    except Exception as another:
        logger.warning("after %r: %s: %s", error, type(another).__name__, another)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """A run that is told to end leaves through its `finally`s, so that nothing half-written stays: status 128 + the signal."""

    def end(number: int, frame) -> None:
        for signum in before:
            signal.signal(signum, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        print(f"{_command()}: ended by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    available = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: not all
    before = {signum: signal.getsignal(signum) for signum in available}
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
