"""What a command's shared flags name: the model, its tokenizer, calibration and evaluation windows; and whether they belong together."""

import argparse
import logging
from typing import Any

import torch

from lib.data import sources, windows
from lib.evaluation.perplexity import windows_of
from lib.gradients.folder import GradientNorms
from lib.models import fetch, loading, memory
from lib.models.decoder import Decoder

logger = logging.getLogger(__name__)


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


def read_calibration(args: argparse.Namespace, tokenizer, more: int = 0) -> torch.Tensor:
    """The calibration windows (n, T) that the flags ask for, and `more` that are drawn after them; `settle_bos` comes first."""
    docs = sources.documents(args.dataset, args.data_dir, cache_dir=args.cache_dir, column=args.text_column)
    count, bos = args.nsamples + more, _bos(args, tokenizer)
    return windows.calibration_windows(
        docs, tokenizer, count, args.seq_length, args.seed, args.pack, source=args.dataset, bos=bos, beside=more
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
