"""Text to token windows: calibration windows (n, T) and the token stream perplexity is measured on.

A source is "c4", "wikitext2" or a path to a .txt (one document), .jsonl, .json (both also .gz) or .parquet file with a
`text` column. The two names load from the Hugging Face hub or, with `data_dir`, from the same files in a local copy laid
out as on the hub.
"""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset

logger = logging.getLogger(__name__)

# name -> purpose -> (hub repository, split, file in the repository)
HUB = {
    "c4": {
        "calibration": ("allenai/c4", "train", "en/c4-train.00000-of-01024.json.gz"),
        "evaluation": ("allenai/c4", "validation", "en/c4-validation.00000-of-00008.json.gz"),
    },
    "wikitext2": {
        "calibration": ("Salesforce/wikitext", "train", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
        "evaluation": ("Salesforce/wikitext", "test", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    },
}
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
C4_EVALUATION_DOCUMENTS = 1100  # of the validation shard's 45 thousand, as published code evaluates it
PATIENCE = 1000  # draws without a long enough document before the corpus is searched for one


def check_source(source: str, data_dir: str | None = None, purpose: str = "calibration") -> None:
    """Raise FileNotFoundError or ValueError, before any work, if `source` cannot be what `documents` reads."""
    if source in HUB:
        if data_dir is not None and not (path := _local_copy(source, data_dir, purpose)).is_file():
            raise FileNotFoundError(f"{path} does not exist: --data_dir must hold {source} in the hub's layout")
        return
    path = Path(source)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in BUILDERS or (path.suffix == ".gz" and suffix == ".parquet"):
        raise ValueError(f"dataset {source!r} is neither of {sorted(HUB)} nor a path to .txt, .jsonl, .json (.gz) or .parquet")
    if not path.is_file():
        raise FileNotFoundError(f"dataset file {source} does not exist: give an existing file or one of {sorted(HUB)}")


def documents(source: str, data_dir: str | None = None, purpose: str = "calibration", cache_dir: str | None = None):
    """The documents of a source, as an indexable column of strings; the files stay mapped, not loaded.

    `purpose` is "calibration" or "evaluation" and picks the split of the hub's corpora (module docstring).

    Raises:
        FileNotFoundError: no such file. ConnectionError: the hub is out of reach. ValueError: unknown source, or a file
            without a `text` column.
    """
    check_source(source, data_dir, purpose)
    if source in HUB and data_dir is None:
        repository, split, file = HUB[source][purpose]
        try:
            dataset = load_dataset(repository, data_files={split: file}, split=split, cache_dir=cache_dir)
        except ConnectionError as error:
            raise ConnectionError(
                f"{source} cannot be fetched from the hub ({repository}): give a file instead, or --data_dir (install.md, Offline)"
            ) from error
    else:
        path = _local_copy(source, data_dir, purpose) if source in HUB else Path(source)
        suffixes = [suffix for suffix in path.suffixes if suffix in BUILDERS]
        options = {"sample_by": "document"} if suffixes[-1] == ".txt" else {}
        dataset = load_dataset(BUILDERS[suffixes[-1]], data_files=str(path), split="train", cache_dir=cache_dir, **options)
    if "text" not in dataset.column_names:
        raise ValueError(f'{source} has the columns {dataset.column_names}, none is "text": rename the one that holds the text')
    if len(dataset) == 0:
        raise ValueError(f"{source} holds no documents")
    return dataset["text"]


def calibration_windows(
    docs: Sequence[str], tokenizer, nsamples: int, seq_length: int, seed: int, pack: bool = False
) -> torch.Tensor:
    """Draw `nsamples` windows of `seq_length` tokens: (n, T) int64, the same for the same seed, tokenizer and documents.

    As published: one `random.Random(seed)` draws a document until one has more than T tokens, then the window's start in
    it. With `pack`, documents are drawn in random order without repetition, joined with the EOS token and cut.

    Raises:
        ValueError: no document is longer than T tokens, or (packed) all of them together hold fewer than n * T tokens.
    """
    rng = random.Random(seed)
    draw = _packed_windows if pack else _document_windows
    return torch.tensor(draw(docs, tokenizer, nsamples, seq_length, rng), dtype=torch.int64)


def evaluation_tokens(docs: Sequence[str], tokenizer, source: str = "") -> torch.Tensor:
    """The documents joined with blank lines and tokenized once: (n_tokens,) int64."""
    if source == "c4":
        docs = docs[:C4_EVALUATION_DOCUMENTS]
    return torch.tensor(_tokenize(tokenizer, "\n\n".join(docs)), dtype=torch.int64)


def _local_copy(source: str, data_dir: str, purpose: str) -> Path:
    repository, _, file = HUB[source][purpose]
    return Path(data_dir, repository, file)


def _tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]  # not verbose: no warning that a document exceeds the context


def _document_windows(docs, tokenizer, nsamples, seq_length, rng) -> list[list[int]]:
    windows, misses = [], 0
    while len(windows) < nsamples:
        tokens = _tokenize(tokenizer, docs[rng.randint(0, len(docs) - 1)])
        if len(tokens) <= seq_length:
            misses += 1
            if misses == PATIENCE:  # perhaps no document will ever do: settle it, without touching the generator
                _require_long_document(docs, tokenizer, seq_length)
            continue
        start = rng.randint(0, len(tokens) - seq_length - 1)
        windows.append(tokens[start : start + seq_length])
    return windows


def _require_long_document(docs, tokenizer, seq_length) -> None:
    longest = 0
    for text in docs:
        longest = max(longest, len(_tokenize(tokenizer, text)))
        if longest > seq_length:
            return
    raise ValueError(
        f"none of the {len(docs)} documents has more than {seq_length} tokens (the longest has {longest}): "
        f"use --seq_length {max(longest - 1, 1)} or less, or --pack to join documents"
    )


def _packed_windows(docs, tokenizer, nsamples, seq_length, rng) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        raise ValueError("--pack joins documents with the EOS token, and this tokenizer has none: set one, or do not pack")
    stream: list[int] = []
    for index in rng.sample(range(len(docs)), len(docs)):
        stream += [*_tokenize(tokenizer, docs[index]), tokenizer.eos_token_id]
        if len(stream) >= nsamples * seq_length:
            return [stream[i * seq_length : (i + 1) * seq_length] for i in range(nsamples)]
    raise ValueError(
        f"all {len(docs)} documents packed hold {len(stream)} tokens, fewer than {nsamples} windows of {seq_length}: "
        f"use fewer --nsamples (at most {len(stream) // seq_length}), a shorter --seq_length or more text"
    )
