"""Shared flags to values: the model, its tokenizer, calibration and evaluation windows; and whether they belong together.

Nothing below this room sees an `argparse.Namespace`, and nobody writes to one: what is found is a frozen value.
"""

import argparse
import logging
from dataclasses import dataclass
from typing import Any

import torch

from lib.data import sources, windows
from lib.data.windows import windows_of
from lib.errors import InvalidInput
from lib.gradients.folder import GradientNorms
from lib.models import loading, memory
from lib.models.config import needs_bos, positions
from lib.models.decoder import Decoder
from lib.models.files import fetch
from lib.models.files.older_readers import older_readers
from lib.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outline:
    """A model before its weights are read: names and shapes, its tokenizer, the folder on this machine that it is in."""

    decoder: Decoder
    tokenizer: Any
    folder: str
    bos: str  # "first" or "every", what --bos means for this model

    @property
    def bos_id(self) -> int | None:
        """What stands before every window, if anything does."""
        return self.tokenizer.bos_token_id if self.bos == "every" else None


def open_model(args: argparse.Namespace) -> Outline:
    """The model's outline, its tokenizer, and where it is on this machine, as yet without its weights.

    Raises:
        Refusal: see `fetch.folder`, `loading.outline`, `load_tokenizer`; a window that is longer than the model's
            positions; BOS before every window, and the tokenizer has none.
    """
    folder = fetch.folder(args.model, revision=args.revision, cache_dir=args.cache_dir)
    decoder = loading.outline(folder, trust_remote_code=args.trust_remote_code)
    for misread in older_readers(folder):
        logger.warning("%s: %s", args.model, misread)
    _check_length(args, decoder)
    tokenizer = load_tokenizer(folder, trust_remote_code=args.trust_remote_code)
    return Outline(decoder, tokenizer, folder, _bos_of(args, decoder, tokenizer))


def load(args: argparse.Namespace, device: torch.device, outline: Outline, needs: memory.Needs) -> tuple[Decoder, memory.Plan]:
    """Load the model, in memory or streamed as `memory.plan` decides."""
    plan = memory.plan(
        outline.decoder,
        needs,
        memory=args.memory,
        dtype=loading.resolve_dtype(args.dtype, outline.decoder.model.config, device),
        device=device,
        seq_length=args.seq_length,
        activation_memory=args.activation_memory,
    )
    with memory.watched(plan, device):
        decoder = load_weights(args, device, outline, plan.streamed)
    logger.info("%s: %d blocks in %s on %s", args.model, len(decoder), decoder.model.dtype, decoder.device)
    if decoder.skipped:
        logger.warning("blocks %s stay dense: %s runs text without them", sorted(decoder.skipped), args.model)
    return decoder, plan.measured(decoder)


def load_weights(args: argparse.Namespace, device: torch.device, outline: Outline, streamed: bool = False) -> Decoder:
    """The model that `open_model` has outlined."""
    fetch.folder(args.model, revision=args.revision, cache_dir=args.cache_dir, weights=True)
    options = {"dtype": args.dtype, "device": device, "streamed": streamed, "trust_remote_code": args.trust_remote_code}
    return loading.load(outline.folder, **options)


def read_calibration(args: argparse.Namespace, outline: Outline, more: int = 0) -> torch.Tensor:
    """The calibration windows (n, T) that the flags ask for, and `more` that are drawn after them."""
    docs = sources.documents(args.dataset, args.data_dir, cache_dir=args.cache_dir, column=args.text_column)
    count, bos = args.nsamples + more, outline.bos_id
    return windows.calibration_windows(
        docs, outline.tokenizer, count, args.seq_length, args.seed, args.pack, source=args.dataset, bos=bos, beside=more
    )


def read_evaluation(args: argparse.Namespace, outline: Outline, source: str) -> torch.Tensor:
    """The windows (m, T) that a perplexity on `source` is measured on."""
    docs = sources.documents(source, args.data_dir, "evaluation", args.cache_dir, args.text_column)
    stream = windows.evaluation_tokens(docs, outline.tokenizer, source, outline.bos_id)
    return windows_of(stream, args.seq_length, outline.bos_id)[: windows.EVALUATION_WINDOWS.get(source)]


def check_vocabulary(args: argparse.Namespace, outline: Outline, *texts: torch.Tensor | None) -> None:
    """Raise InvalidInput if windows hold ids that the model has no embedding for; warn if only the tokenizer has such ids."""
    tokenizer, embeddings = outline.tokenizer, outline.decoder.model.get_input_embeddings().weight.shape[0]
    used = max(int(tokens.max()) for tokens in texts if tokens is not None)
    known = max(tokenizer.get_vocab().values())
    if used >= embeddings:
        raise InvalidInput(
            f"the text has token ids up to {used} by this tokenizer ({type(tokenizer).__name__}), but {args.model} only "
            f"{embeddings} embeddings: use the model's own tokenizer, or text without the tokens that were added to it"
        )
    if known >= embeddings:
        logger.warning(
            "the tokenizer (%s) has token ids up to %d, but %s only %d embeddings; the text has none of the ids beyond them",
            type(tokenizer).__name__, known, args.model, embeddings,
        )  # fmt: skip


def compare_samples(args: argparse.Namespace, outline: Outline, gradients: GradientNorms) -> None:
    """Warn if the gradients are not from the samples that these flags draw."""
    recorded = {"text_column": None, "bos": "first", **gradients.index}  # neither is in older folders and published files
    drawn = vars(args) | {"bos": outline.bos}
    for flag in ("nsamples", "seq_length", "seed", "dataset", "pack", "text_column", "bos"):
        if recorded.get(flag, drawn[flag]) != drawn[flag]:
            logger.warning(
                "the gradients were computed with --%s %s, the activations will be with %s: run gradient_computation.py "
                "with the same flags to have both from the same samples", flag, recorded[flag], drawn[flag],
            )  # fmt: skip


def _check_length(args: argparse.Namespace, decoder: Decoder) -> None:
    """Raise InvalidInput if a window has more positions than the model; warn if the model was not trained on so many."""
    count, learned = positions(decoder)
    if count is None or args.seq_length <= count:
        return
    if learned:
        raise InvalidInput(f"--seq_length {args.seq_length} is beyond the {count} positions {args.model} has: shorten it")
    logger.warning(
        "--seq_length %d is beyond the %d positions %s was made for (max_position_embeddings): perplexity and masks suffer",
        args.seq_length, count, args.model,
    )  # fmt: skip


def _bos_of(args: argparse.Namespace, decoder: Decoder, tokenizer) -> str:
    """What --bos means for this model, "first" or "every"."""
    family, bos = decoder.model.config.model_type, args.bos
    if bos == "auto":
        bos = "every" if needs_bos(decoder) else "first"
        if bos == "every":
            logger.info("--bos every: %s models need BOS before every window", family)
    if bos == "every" and tokenizer.bos_token_id is None:
        raise InvalidInput(f"the tokenizer of this {family} model has no BOS token to put before every window: use --bos first")
    return bos
