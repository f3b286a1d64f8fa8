"""A document to token ids: BOS or not, a conversation by the tokenizer's chat template, a long text in pieces."""

import logging
import time
from collections.abc import Sequence

import torch

from lib.data.readers import Document
from lib.errors import InvalidInput

logger = logging.getLogger(__name__)

PIECE = 2**21  # characters tokenized at a time: a second or two. Any document of C4 and WikiText-2's test split are one piece
OVERLAP = 2**12  # characters on each side of a cut between pieces that both of them see
CUTS = 16  # places tried for one cut
KEPT = 2**25  # tokens that TokenizedDocuments keeps: 128 MB
SILENCE = 5.0  # seconds


class Progress:
    """Tells the log how far a long job is, every few seconds and never about a short one."""

    def __init__(self):
        self.told = time.monotonic()

    def __call__(self, message: str, *values) -> None:
        if time.monotonic() - self.told > SILENCE:
            self.told = time.monotonic()
            logger.info(message, *values)


class TokenizedDocuments:
    """Token ids (int32) of documents by their index; those used last are kept, and always the last one."""

    def __init__(self, docs: Sequence[Document], tokenizer, bos: int | None):
        self.docs = docs
        self.tokenizer = tokenizer
        self.bos = bos
        self.kept: dict[int, torch.Tensor] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self.docs)

    def __getitem__(self, i: int) -> torch.Tensor:
        if i in self.kept:
            tokens = self.kept.pop(i)
        else:
            tokens = tokens_of(self.docs[i], self.tokenizer, self.bos)
            self.total += len(tokens)
        self.kept[i] = tokens  # a dict remembers its order
        while self.total > KEPT and len(self.kept) > 1:
            self.total -= len(self.kept.pop(next(iter(self.kept))))
        return tokens


def tokens_of(doc: Document, tokenizer, bos: int | None = None) -> torch.Tensor:
    """The tokens of a document: (n_tokens,) int32.

    As the tokenizer has it, special tokens included; with `bos`, the id that will stand before every window, the text's alone.
    The chat template writes the special tokens of a conversation itself.
    """
    return encode(tokenizer, text_of(doc, tokenizer), special=isinstance(doc, str) and bos is None, without=bos)


def text_of(doc: Document, tokenizer) -> str:
    """A document as the tokenizer reads it.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template or its template refuses it.
    """
    if isinstance(doc, str):
        return doc
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"the text is conversations, and the tokenizer ({type(tokenizer).__name__}) has no chat template to write them with: "
            "use the model's chat version, or text that is written already (--text_column)"
        )
    try:
        return tokenizer.apply_chat_template(doc, tokenize=False)
    except Exception as error:  # what a template raises is its author's choice
        begin = f"{doc[0]['role']}: {doc[0]['content'][:40]!r}"
        raise InvalidInput(
            f"the tokenizer's chat template refuses the conversation that begins with {begin} ({error}): leave it out, or change it"
        ) from error


def encode(tokenizer, text: str, special: bool = True, without: int | None = None) -> torch.Tensor:
    """Token ids (n_tokens,) int32 of a text; `special`: with the tokens that the tokenizer puts around it.

    A text longer than PIECE is tokenized in pieces if the tokenizer can tell which characters a token is from, and its tokens
    are the same then (`_in_pieces`). `without`: an id that is left out at the beginning.
    """
    pieces = _in_pieces(tokenizer, text) if len(text) > PIECE and getattr(tokenizer, "is_fast", False) else None
    if pieces is None or (special and (around := _special_tokens(tokenizer)) is None):
        options = {} if special else {"add_special_tokens": False}
        pieces = _ids(tokenizer(text, verbose=False, **options))  # not verbose: no warning that it exceeds the context
    elif special:
        pieces = torch.cat([around[0], pieces, around[1]])
    return pieces[1:] if without is not None and len(pieces) and pieces[0] == without else pieces


def _ids(encoding) -> torch.Tensor:
    return torch.tensor(encoding["input_ids"], dtype=torch.int32)


def _special_tokens(tokenizer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The ids a tokenizer puts before and after a text; None if that cannot be told."""
    with_them, text = _ids(tokenizer("a")).tolist(), _ids(tokenizer("a", add_special_tokens=False)).tolist()
    for i in range(len(with_them)):
        if text and with_them[i : i + len(text)] == text:
            return torch.tensor(with_them[:i], dtype=torch.int32), torch.tensor(with_them[i + len(text) :], dtype=torch.int32)
    return None


def _in_pieces(tokenizer, text: str) -> torch.Tensor | None:
    """A long text's tokens, without special ones, PIECE characters at a time; None where that cannot be done.

    Pieces overlap. A tokenizer looks a few characters ahead and behind, not thousands: where a piece that ends OVERLAP
    characters behind a cut and one that begins OVERLAP characters before it give the same tokens half as far on both sides,
    neither's end reaches the cut, and they are joined there. Where they differ (within a run of one character, say),
    another cut is tried.
    """
    progress, joined = Progress(), []
    left, first, stop = _piece(tokenizer, text, 0, PIECE), 0, PIECE  # `first`: the token of `left` that its own cut ends before
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
    """Tokens of text[begin:stop], and where in the text each of them ends."""
    encoding = tokenizer(text[begin:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return _ids(encoding), torch.tensor([end for _, end in encoding["offset_mapping"]]) + begin


def _join(left, right, cut: int) -> tuple[int, int] | None:
    """How many tokens of each piece end before the cut; None if they differ around it."""
    reach = OVERLAP // 2
    around = [(ids[near := (ends - cut).abs() < reach], ends[near]) for ids, ends in (left, right)]
    (ids, ends), (other_ids, other_ends) = around
    both_sides = (ends <= cut).any() and (ends > cut).any()
    if not both_sides or not torch.equal(ids, other_ids) or not torch.equal(ends, other_ends):
        return None
    return int((left[1] <= cut).sum()), int((right[1] <= cut).sum())
