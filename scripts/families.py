"""Try this project on a tiny random model of every type of causal language model that transformers registers.

    python scripts/families.py --output docs/families.md
    python scripts/families.py mixtral gemma3

Prints a line for each type: that it works, and the share of its blocks' weights that can be pruned; or why it does not. Exits
with 1 if a result is wrong. That a type works means: block by block, loss and gradients equal those of autograd on the whole
model; Wanda's masks equal those of a naive restatement; read from its files block by block, the model is pruned to the very same
weights; and the checkpoint has the dense one's names, and plain transformers loads it and gives the pruned model's logits.
"""

import argparse
import copy
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from restatements import Wrong, compare_gradients, compare_wanda, require_equal
from tiny_configs import TYPES, VOCABULARY, WRAPPERS, tiny_model

from lib.errors import InvalidInput
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import Checkpoint
from lib.models.files.pruned_checkpoint import Store
from lib.pruning.masks import Sparsity
from lib.pruning.methods import Settings
from lib.pruning.prune import prune
from lib.pruning.targets import select

SAMPLES, LENGTH = 3, 12
SECONDS = 300  # that a type may take
LACKS = {  # type that is not made -> what it lacks
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "keys and values of its own: it reads a Gemma 4's, as it drafts for it",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "text as its input: it is a decoder of sound that stands behind a text encoder"
    ),
    **dict.fromkeys(
        ("gemma3n", "fast_vlm", "perception_lm"), "the package timm, for its vision tower (with it, gemma3n works)"
    ),
    "inkling_mm_model": "the package scipy",
    "evolla": "a class that transformers' automatic ones know",
    "florence2": "a decoder alone: it is an encoder-decoder",
}
ROOT = Path(__file__).resolve().parents[1]


class NotMade(Exception):
    """A tiny model of a type cannot be made."""


def check(kind: str, **changes) -> str:
    """Try a type; returns the share of its blocks' weights that can be pruned, in words.

    Raises:
        InvalidInput: this project refuses the type.
        NotMade: there is no tiny model of the type to try.
        Wrong: a result is not what it must be.
    """
    with tempfile.TemporaryDirectory() as folder:
        dense, windows = Path(folder, "dense"), sample_windows()
        try:
            tiny_model(kind, **changes).save_pretrained(dense)
        except Exception as error:  # transformers raises another one for each family
            lacking = LACKS.get(kind) or f"a config that this script can make: {in_one_line(error)}"
            raise NotMade(f"it lacks {lacking}") from error
        try:
            loading.outline(str(dense))
            decoder = load(dense)
        except ValueError as error:
            raise InvalidInput(str(error).replace(str(dense), "it")) from error
        compare_gradients(copy.deepcopy(decoder.model), decoder, windows)
        check_pruning(dense, windows)
    return f"{decoder.share:.1%}"


def load(folder: Path, **options) -> Decoder:
    return loading.load(str(folder), dtype="float32", device="cpu", **options)


def sample_windows() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def check_pruning(folder: Path, windows: torch.Tensor) -> None:
    """Prune with Wanda, in memory and from the files; compare the two, the checkpoint, and a naive restatement."""
    pruned = folder.with_name("pruned")
    decoder, streamed = load(folder), load(folder, streamed=True)
    dense = copy.deepcopy(decoder.model)
    ratio = Sparsity(0.5)
    list(prune(decoder, windows, Settings("wanda", select(decoder, ratio))))
    store, targets = Store(pruned, streamed.source), select(streamed, ratio)
    for block in prune(streamed, windows, Settings("wanda", targets)):
        store.write_block(streamed, block.index, targets.get(block.index, ()))
    store.finish()
    before, after = Checkpoint(str(folder)), Checkpoint(str(pruned))
    if before.where != after.where:
        raise Wrong("the pruned checkpoint has other names than the dense one")
    loaded = load(pruned).model
    state = decoder.model.state_dict()
    for name, value in loaded.state_dict().items():
        if not torch.equal(value, state[name]):
            raise Wrong(f"{name} of the streamed run is not that of the run in memory")
    with torch.no_grad():
        logits = [m(input_ids=windows[:1], use_cache=False).logits for m in (loaded, decoder.model)]
    require_equal("logits of the saved checkpoint", *logits)
    compare_wanda(dense, decoder, windows)


def isolated(kind: str) -> tuple[str, str]:
    """Try a type in another process: (works, refused, not made, wrong or crashed; the share or the reason)."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(kind, sender))
    process.start()
    sender.close()
    answer = ("crashed", f"no answer in {SECONDS} seconds")
    if receiver.poll(SECONDS):
        try:
            answer = receiver.recv()
        except EOFError:
            answer = ("crashed", "the process died")
    process.kill()
    process.join()
    return answer


def report(kind: str, sender) -> None:
    """Try a type, and send what `isolated` returns."""
    try:
        answer = ("works", check(kind))
    except Wrong as error:
        answer = ("wrong", str(error))
    except NotMade as error:
        answer = ("not made", str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = ROOT in Path(where.filename).parents and "site-packages" not in where.filename
        refused = isinstance(error, ValueError) and ours
        place = "" if refused else f" [{type(error).__name__}, {Path(where.filename).name}:{where.lineno}]"
        answer = ("refused" if refused else "crashed", in_one_line(error) + place)
    sender.send(answer)


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def page(answers: dict[str, dict[str, tuple[str, str]]]) -> str:
    """Markdown with a table for each group of types, {title: {type: (status, share or reason)}}."""
    lines = [
        "# Families",
        "",
        "What this project does with a tiny random model of every type of language model that transformers",
        f"{transformers.__version__} registers.",
        "",
        "- *Works*: block by block, loss and gradients are those of autograd on the whole model (within 1e-4). Wanda's",
        "  masks are those of a naive restatement. Read from its files block by block, the model is pruned to the very",
        "  same weights (on a CPU). The checkpoint has the dense one's names, and plain transformers loads it and gives",
        "  the pruned model's logits. The number is the share of the (tiny) blocks' weights that can be pruned. The",
        "  rest is not used in a matrix product, or routes tokens to experts, and stays dense.",
        "- *Refused*: the run ends with this one line before any work. Encoders are refused. So are decoders whose",
        '  `labels` are not shifted by one, because their loss is not that of the next token: "their loss is ..., that',
        '  of the whole model ...".',
        "- *Not made*: a tiny model of this type could not be made, for lack of what the line says.",
        "",
        "Written by `python scripts/families.py --output docs/families.md`.",
    ]
    for title, group in answers.items():
        works = sum(status == "works" for status, _ in group.values())
        lines += ["", f"## {title}: {works} of {len(group)} work", "", "| type | | share, or why not |", "|---|---|---|"]
        lines += [f"| {kind} | {status} | {text.replace('|', ' ')} |" for kind, (status, text) in group.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> bool:
    """Try types one by one; returns whether a result is wrong or a type crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model_type of a config (default: all)")
    parser.add_argument("--output", type=Path, help="file to write the page to (docs/families.md)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    groups = {"Language models": TYPES, "Language models in multimodal wrappers": WRAPPERS}
    if args.types:
        groups = {"Types": args.types}
    answers: dict[str, dict[str, tuple[str, str]]] = {}
    for title, kinds in groups.items():
        for kind in kinds:
            status, text = answers.setdefault(title, {})[kind] = isolated(kind)
            print(f"{kind}: {status}, {text}", flush=True)
    if args.output:
        args.output.write_text(page(answers))
    statuses = [status for group in answers.values() for status, _ in group.values()]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))
    return "wrong" in statuses or "crashed" in statuses


if __name__ == "__main__":
    sys.exit(main())
