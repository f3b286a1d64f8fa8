"""Turns documents into token windows: calibration windows (n, T), and the token stream that perplexity is measured on.

If `bos` is set, that id stands before every window, as some models need it (`--bos every`): a window is then BOS and T - 1
tokens of text. If it is None, BOS is where the tokenizer puts it, once before a document, as in the published code.
"""

import logging
import random
from collections.abc import Iterable, Sequence
from itertools import islice

import torch

from lib.data.readers import Document
from lib.data.tokens import Progress, TokenizedDocuments, encode, text_of
from lib.errors import InvalidInput

logger = logging.getLogger(__name__)

JOINED = {"wikitext2": " "}  # corpus whose rows are paragraphs -> what joins its rows to the calibration text
C4_EVALUATION_DOCUMENTS = 1100  # of the 45 thousand in the validation shard, as in the published evaluation
EVALUATION_WINDOWS = {"c4": 256}  # at most so many windows of a corpus, as in the published evaluation
PATIENCE = 1000  # draws of too short documents before all documents are searched for one that is long enough


def calibration_windows(
    docs: Sequence[Document],
    tokenizer,
    nsamples: int,
    seq_length: int,
    seed: int,
    pack: bool = False,
    *,
    source: str = "",
    bos: int | None = None,
    beside: int = 0,
) -> torch.Tensor:
    """Draw `nsamples` windows of `seq_length` tokens: (n, T) int64, the same for the same seed, tokenizer and documents.

    As in the published code, one `random.Random(seed)` draws documents until one has more than T tokens, then draws where the
    window starts in it. All text of a source in JOINED is one stream, in which only the starts are drawn. With `pack`, the
    documents are put in random order, joined with the EOS token and cut into windows.

    Args:
        beside: how many of the `nsamples` windows are drawn for another purpose than --nsamples. The error that advises fewer
            --nsamples subtracts them.

    Raises:
        InvalidInput: no document is longer than T tokens, or (packed or joined) all documents together are too short.
    """
    rng = random.Random(seed)
    length = seq_length - (bos is not None)
    if pack:
        windows = _packed_windows(TokenizedDocuments(docs, tokenizer, bos), nsamples, length, rng, beside)
    elif source in JOINED:
        stream = _joined(docs, tokenizer, JOINED[source], bos)
        windows = _stream_windows(stream, nsamples, length, rng)
    else:
        windows = _document_windows(TokenizedDocuments(docs, tokenizer, bos), nsamples, length, rng)
    return with_bos(torch.stack(windows).long(), bos)


def evaluation_tokens(docs: Iterable[Document], tokenizer, source: str = "", bos: int | None = None) -> torch.Tensor:
    """The documents joined with blank lines (the first 1100 of c4 with spaces) and tokenized as one text: (n_tokens,) int64."""
    if source == "c4":
        return _joined(islice(docs, C4_EVALUATION_DOCUMENTS), tokenizer, " ", bos).long()
    return _joined(docs, tokenizer, "\n\n", bos).long()


def windows_of(tokens: torch.Tensor, seq_length: int, bos: int | None = None) -> torch.Tensor:
    """Cut a stream (n_tokens,) into full windows (n, T); the short tail is dropped.

    With `bos`, every window is that id and T - 1 tokens of the stream. All of these tokens are targets, BOS is not.

    Raises:
        InvalidInput: the text is shorter than one window.
    """
    length = seq_length - (bos is not None)
    count = len(tokens) // length
    if count == 0:
        raise InvalidInput(
            f"the evaluation text has {len(tokens)} tokens, fewer than one window of {length}: shorten --seq_length"
        )
    return with_bos(tokens[: count * length].view(count, length), bos)


def with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Windows (n, T - 1) with BOS before each of them, (n, T); without `bos`, the windows as they are."""
    return windows if bos is None else torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def _joined(docs: Iterable[Document], tokenizer, separator: str, bos: int | None) -> torch.Tensor:
    docs = list(docs)
    text = separator.join(text_of(doc, tokenizer) for doc in docs)
    templated = bool(docs) and not isinstance(docs[0], str)  # the chat template has written the special tokens already
    return encode(tokenizer, text, special=bos is None and not templated, without=bos)


def _document_windows(docs: TokenizedDocuments, nsamples: int, length: int, rng: random.Random) -> list[torch.Tensor]:
    windows, drawn, misses, progress = [], set(), 0, Progress()
    while len(windows) < nsamples:
        index = rng.randint(0, len(docs) - 1)
        tokens = docs[index]
        if len(tokens) <= length:
            misses += 1
            progress("%d of %d windows; %d of the documents drawn were too short for one", len(windows), nsamples, misses)
            if misses == PATIENCE:  # perhaps none is long enough: find out without using the random generator
                _require_long_document(docs, length)
            continue
        start = rng.randint(0, len(tokens) - length - 1)
        windows.append(tokens[start : start + length])
        drawn.add(index)
    few = len(drawn) < nsamples / 2 and len(docs) > 1
    logger.log(
        logging.WARNING if few else logging.INFO,
        "%d windows from %d documents%s", nsamples, len(drawn),
        f" (of {len(docs)}): few are longer than {length} tokens, --pack would join the others" if few else "",
    )  # fmt: skip
    return windows


def _require_long_document(docs: TokenizedDocuments, length: int) -> None:
    longest, progress = 0, Progress()
    for i in range(len(docs)):
        longest = max(longest, len(docs[i]))
        progress("none of the first %d of %d documents has more than %d tokens", i + 1, len(docs), length)
        if longest > length:
            return
    shorter = f"use --seq_length {longest - 1} or less, or " if longest > 2 else ""
    raise InvalidInput(
        f"none of the {len(docs)} documents has more than {length} tokens (the longest has {longest}): "
        f"{shorter}--pack to join documents"
    )


def _stream_windows(stream: torch.Tensor, nsamples: int, length: int, rng: random.Random) -> list[torch.Tensor]:
    if len(stream) <= length:
        raise InvalidInput(
            f"the whole text has {len(stream)} tokens, a window needs more than {length}: use a shorter --seq_length"
        )
    starts = [rng.randint(0, len(stream) - length - 1) for _ in range(nsamples)]
    return [stream[start : start + length] for start in starts]


def _packed_windows(
    docs: TokenizedDocuments, nsamples: int, length: int, rng: random.Random, beside: int
) -> list[torch.Tensor]:
    end = docs.tokenizer.eos_token_id
    if end is None:
        raise InvalidInput("--pack joins documents with the EOS token, and this tokenizer has none: set one, or do not pack")
    parts, total, progress = [], 0, Progress()
    for index in rng.sample(range(len(docs)), len(docs)):
        parts += [docs[index], torch.tensor([end], dtype=torch.int32)]
        total += len(parts[-2]) + 1
        progress("%d of %d windows packed", total // length, nsamples)
        if total >= nsamples * length:
            return list(torch.cat(parts)[: nsamples * length].split(length))
    most = total // length - beside
    fewer = f"use fewer --nsamples (at most {most}), " if most > 0 else "use "
    raise InvalidInput(
        f"all {len(docs)} documents packed hold {total} tokens, fewer than {nsamples} windows of {length}: "
        f"{fewer}a shorter --seq_length or more text"
    )
