"""Turns a document into token ids: with or without BOS, a conversation by its chat template, a long text in pieces."""

import logging
import time
from collections.abc import Sequence

import torch

from lib.data.readers import Document
from lib.errors import InvalidInput

logger = logging.getLogger(__name__)

PIECE = 2**21  # characters tokenized at a time, in a second or two; C4's documents and WikiText-2's test split fit in one piece
OVERLAP = 2**12  # characters on each side of a cut that both neighbouring pieces contain
CUTS = 16  # places that are tried for one cut
CACHED_TOKENS = 2**25  # tokens that TokenizedDocuments holds in memory, 128 MB
SILENCE = 5.0  # seconds between two log lines of a long job


class Progress:
    """Logs how far a long job is, every few seconds. A short job logs nothing."""

    def __init__(self):
        self.logged = time.monotonic()

    def __call__(self, message: str, *values) -> None:
        if time.monotonic() - self.logged > SILENCE:
            self.logged = time.monotonic()
            logger.info(message, *values)


class TokenizedDocuments:
    """Token ids (int32) of documents by their index. Those used last are cached, the very last one whatever its length."""

    def __init__(self, docs: Sequence[Document], tokenizer, bos: int | None):
        self.docs = docs
        self.tokenizer = tokenizer
        self.bos = bos
        self.cache: dict[int, torch.Tensor] = {}  # the one used last comes last
        self.total = 0  # tokens in the cache

    def __len__(self) -> int:
        return len(self.docs)

    def __getitem__(self, i: int) -> torch.Tensor:
        if i in self.cache:
            tokens = self.cache.pop(i)
        else:
            tokens = tokens_of(self.docs[i], self.tokenizer, self.bos)
            self.total += len(tokens)
        self.cache[i] = tokens
        while self.total > CACHED_TOKENS and len(self.cache) > 1:
            self.total -= len(self.cache.pop(next(iter(self.cache))))
        return tokens


def tokens_of(doc: Document, tokenizer, bos: int | None = None) -> torch.Tensor:
    """The tokens of a document: (n_tokens,) int32.

    A text comes with the special tokens that the tokenizer puts around it. If `bos` is set, the id that will stand before every
    window, it comes without them. A conversation has the special tokens that its chat template writes, except a leading `bos`.
    """
    return encode(tokenizer, text_of(doc, tokenizer), special=isinstance(doc, str) and bos is None, without=bos)


def text_of(doc: Document, tokenizer) -> str:
    """A document as the tokenizer reads it.

    Raises:
        InvalidInput: it is a conversation, and the tokenizer has no chat template, or the template refuses it.
    """
    if isinstance(doc, str):
        return doc
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"the text consists of conversations, and the tokenizer ({type(tokenizer).__name__}) has no chat template for "
            "them: use the model's chat version, or name a column of plain text with --text_column"
        )
    try:
        return tokenizer.apply_chat_template(doc, tokenize=False)
    except Exception as error:  # what a template raises is its author's choice
        begin = f"{doc[0]['role']}: {doc[0]['content'][:40]!r}"
        raise InvalidInput(
            f"the tokenizer's chat template refuses the conversation that begins with {begin} ({error}): leave it out, or "
            "change it"
        ) from error


def encode(tokenizer, text: str, special: bool = True, without: int | None = None) -> torch.Tensor:
    """Token ids (n_tokens,) int32 of a text.

    A text longer than PIECE is tokenized in pieces if the tokenizer can tell which characters a token is made from. The token
    ids are the same either way (see `_in_pieces`).

    Args:
        special: add the special tokens that the tokenizer puts around a text.
        without: an id that is left out if it comes first.
    """
    tokens = _in_pieces(tokenizer, text) if len(text) > PIECE and getattr(tokenizer, "is_fast", False) else None
    if tokens is None or (special and (around := _special_tokens(tokenizer)) is None):
        options = {} if special else {"add_special_tokens": False}
        tokens = _ids(tokenizer(text, verbose=False, **options))  # verbose would warn of a text beyond the context
    elif special:
        tokens = torch.cat([around[0], tokens, around[1]])
    return tokens[1:] if without is not None and len(tokens) and tokens[0] == without else tokens


def _ids(encoding) -> torch.Tensor:
    return torch.tensor(encoding["input_ids"], dtype=torch.int32)


def _special_tokens(tokenizer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The ids that a tokenizer puts before and after a text; None if they cannot be told apart from those of the text."""
    whole, text = _ids(tokenizer("a")).tolist(), _ids(tokenizer("a", add_special_tokens=False)).tolist()
    for i in range(len(whole)):
        if text and whole[i : i + len(text)] == text:
            return torch.tensor(whole[:i], dtype=torch.int32), torch.tensor(whole[i + len(text) :], dtype=torch.int32)
    return None


def _in_pieces(tokenizer, text: str) -> torch.Tensor | None:
    """Tokens of a long text, without special ones, from pieces of PIECE characters; None if the pieces cannot be joined.

    Neighbouring pieces overlap: the left one ends OVERLAP characters after their cut, the right one begins OVERLAP characters
    before it. A tokenizer looks a few characters ahead and back, not thousands. So if both pieces have the same tokens within
    OVERLAP / 2 of the cut, the tokens there do not depend on where the pieces end, and the pieces are joined at the cut. If
    the tokens differ (within a run of one character, for instance), another cut is tried.
    """
    progress, joined = Progress(), []
    left, stop = _piece(tokenizer, text, 0, PIECE), PIECE
    first = 0  # of the tokens of `left` that are not joined yet
    while stop < len(text):
        cuts = (stop - OVERLAP - i * (PIECE // 2 // CUTS) for i in range(CUTS))
        cut = next((c for c in cuts if _join(left, _piece(tokenizer, text, c - OVERLAP, c + OVERLAP), c)), None)
        if cut is None:
            return None
        stop = min(cut - OVERLAP + PIECE, len(text))
        right = _piece(tokenizer, text, cut - OVERLAP, stop)
        if (at := _join(left, right, cut)) is None:
            return None
        joined.append(left[0][first : at[0]])
        left, first = right, at[1]
        progress("tokenized %.1f of %.1f million characters", cut / 1e6, len(text) / 1e6)
    return torch.cat([*joined, left[0][first:]])


def _piece(tokenizer, text: str, begin: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of text[begin:stop], and the place in the whole text where each of them ends."""
    encoding = tokenizer(text[begin:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return _ids(encoding), torch.tensor([end for _, end in encoding["offset_mapping"]]) + begin


def _join(left, right, cut: int) -> tuple[int, int] | None:
    """How many tokens of each piece end at the cut or before it; None if the pieces differ around the cut."""
    reach = OVERLAP // 2
    around = [(ids[near := (ends - cut).abs() < reach], ends[near]) for ids, ends in (left, right)]
    (ids, ends), (other_ids, other_ends) = around
    both_sides = (ends <= cut).any() and (ends > cut).any()
    if not both_sides or not torch.equal(ids, other_ids) or not torch.equal(ends, other_ends):
        return None
    return int((left[1] <= cut).sum()), int((right[1] <= cut).sum())
