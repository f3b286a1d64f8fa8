"""Try this project on a tiny random model of every type of causal language model that transformers registers.

    python scripts/families.py --output docs/families.md
    python scripts/families.py mixtral gemma3

A line for each type: works, and the share of its blocks' weights that can be pruned, or why not. Exits with 1 if one is wrong.
Works means: block by block, loss and gradients equal those of autograd on the whole model; wanda's masks equal those of a
naive restatement; read from its files block by block, the model is pruned to the very same weights; the checkpoint has the
dense one's names and loads in plain transformers with the pruned model's logits.
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
from torch import nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_configs import TYPES, VOCABULARY, WRAPPERS, tiny_model

from lib.errors import InvalidInput
from lib.gradients.walk import gradient_norms
from lib.models import loading
from lib.models.decoder import Decoder
from lib.models.files.checkpoint import Checkpoint
from lib.models.files.pruned_checkpoint import Store
from lib.models.matrices import kind_of
from lib.pruning.masks import Sparsity
from lib.pruning.methods import Settings
from lib.pruning.prune import prune
from lib.pruning.targets import select

SAMPLES, LENGTH, SCALE = 3, 12, 100.0
TOLERANCE = 1e-4
SECONDS = 300  # that a type may take
LACKS = {  # of types that are not made
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


class Wrong(Exception):
    """A number is not what it must be."""


class NotMade(Exception):
    """There is no model to try."""


def check(kind: str, **changes) -> str:
    """Try a type; returns what can be pruned of it, in words.

    Raises:
        ValueError: this project refuses it, and says why. Wrong: it should have.
    """
    with tempfile.TemporaryDirectory() as folder:
        dense, windows = Path(folder, "dense"), sample_windows()
        try:
            tiny_model(kind, **changes).save_pretrained(dense)
        except Exception as error:  # of transformers, each family its own
            said = LACKS.get(kind) or f"a config that this script can make: {in_one_line(error)}"
            raise NotMade(f"it lacks {said}") from error
        try:
            loading.outline(str(dense))
            decoder = load(dense)
        except ValueError as error:
            raise InvalidInput(str(error).replace(str(dense), "it")) from error
        check_gradients(copy.deepcopy(decoder.model), decoder, windows)
        check_pruning(dense, windows)
    return f"{decoder.share:.1%}"


def load(folder: Path, **options) -> Decoder:
    return loading.load(str(folder), dtype="float32", device="cpu", **options)


def sample_windows() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def check_gradients(model: nn.Module, decoder: Decoder, windows: torch.Tensor) -> None:
    """Loss, and l2 norms of all prunable matrices with the graph kept and recomputed, against whole-model autograd."""
    model.requires_grad_(True)
    sums: dict[str, torch.Tensor] = {}
    for window in windows:
        model.zero_grad()
        loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
        loss.backward()
        state = decoder.enter(window[None])
        for i in range(len(decoder)):
            decoder.advance(i, [state])
        require_equal("the loss", decoder.tail(state.hidden, window[None])[0], loss)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + (SCALE * parameter.grad.double()) ** 2
    model.requires_grad_(False)
    for keep_graph in (True, False):
        for i, block_sums in gradient_norms(decoder, windows, norms=("l2",), scale=SCALE, keep_graph=keep_graph):
            matrices = decoder.linears(i) | decoder.routers(i)
            for name, norm in block_sums.result("l2").items():
                matrix = matrices[name]
                total = sums.get(decoder.prefixes[i] + matrix.tensor_name)
                if total is None:
                    require_equal(decoder.prefixes[i] + name, norm, torch.zeros_like(norm))
                else:
                    expected = matrix.oriented(total if matrix.index is None else total[matrix.index]).sqrt()
                    require_equal(f"the gradient norm of {decoder.prefixes[i]}{name}", norm, expected)


def check_pruning(folder: Path, windows: torch.Tensor) -> None:
    """Wanda, from the files and in memory, against a naive restatement; and the checkpoint."""
    pruned = folder.with_name("pruned")
    decoder, streamed = load(folder), load(folder, streamed=True)
    dense = copy.deepcopy(decoder.model)
    ratio = Sparsity(0.5)
    list(prune(decoder, windows, Settings("wanda", select(decoder, ratio))))
    store = Store(pruned, streamed.source)
    targets = select(streamed, ratio)

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
    naive_wanda(dense, decoder, windows)


def naive_wanda(dense: nn.Module, decoder: Decoder, windows: torch.Tensor) -> None:
    """Compare the pruned blocks with Wanda restated: the whole model is run for every block, and inputs are looked at where
    they meet memory of the matrix they are multiplied with."""
    owners = dict(dense.named_parameters(remove_duplicate=False))
    for i in range(len(decoder)):
        weights = {}
        for name, matrix in decoder.linears(i).items():
            whole = owners[decoder.prefixes[i] + matrix.tensor_name].detach()
            weights[name] = matrix.oriented(whole if matrix.index is None else whole[matrix.index])
        inputs = Inputs(weights)
        with inputs, torch.no_grad():
            for window in windows:
                dense(input_ids=window[None], use_cache=False)
        masks = {}
        for name, weight in weights.items():
            squares = inputs.squares.get(name, torch.zeros(weight.shape[1]))
            if name not in inputs.squares and not any(kind_of(other) == kind_of(name) for other in inputs.squares):
                continue  # takes no part in the forward
            norm = (squares / len(windows)).sqrt()
            reached = norm.any() or kind_of(name) == name
            score = weight.abs() * (norm if reached else 1.0)  # an expert without tokens: by magnitude
            order = score.argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
            masks[name] = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
        for name, mask in masks.items():
            weights[name].masked_fill_(mask, 0)
        for name, matrix in decoder.linears(i).items():
            differing = ((matrix.weight == 0) != (weights[name] == 0)).sum().item()
            if differing > 2 + 0.001 * weights[name].numel():  # a rounding at the threshold flips a pair
                raise Wrong(
                    f"{differing} of {weights[name].numel()} mask bits of {decoder.prefixes[i]}{name} differ from wanda's"
                )
            weights[name].copy_(matrix.weight)  # so that later blocks see the same inputs


class Inputs(TorchFunctionMode):
    """While open, collects the sum over tokens of the squared inputs of matrices {name: (out, in)}, found by their memory."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.names = {(weight.data_ptr(), weight.shape): name for name, weight in weights.items()}
        self.names |= {(weight.data_ptr(), weight.mT.shape): name for name, weight in weights.items()}
        self.squares: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"):
            *_, a, b = [*args, *(kwargs or {}).values()][: 3 if "add" in func.__name__ else 2]
            self.look(a, b)
            if func.__name__ != "linear" and b.ndim > 1:
                self.look(b.mT, a)
        return func(*args, **(kwargs or {}))

    def look(self, given: torch.Tensor, weight: torch.Tensor) -> None:
        many = weight.ndim > 2 and given.ndim > 2
        for x, w in zip(given.expand(len(weight), *given.shape[1:]), weight, strict=True) if many else [(given, weight)]:
            name = self.names.get((w.data_ptr(), w.squeeze().shape))
            if name is not None:
                self.squares[name] = self.squares.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(dim=0)


def require_equal(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    size = expected.double().norm().clamp(min=1e-6)
    error = ((found.double() - expected.double()).norm() / size).item()
    if not error < TOLERANCE:
        raise Wrong(f"{what} is off by {error:.2g}")


def isolated(kind: str) -> tuple[str, str]:
    """(works, refused, wrong or crashed; the share or the reason) of a type, in a process of its own."""
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
    try:
        answer = ("works", check(kind))
    except Wrong as error:
        answer = ("wrong", str(error))
    except NotMade as error:
        answer = ("not made", str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = isinstance(error, ValueError) and ROOT in Path(where.filename).parents and "site-packages" not in where.filename
        place = "" if own else f" [{type(error).__name__}, {Path(where.filename).name}:{where.lineno}]"
        answer = ("refused" if own else "crashed", in_one_line(error) + place)
    sender.send(answer)


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def page(found: dict[str, dict[str, tuple[str, str]]]) -> str:
    """Markdown: a table for every group of types, {title: {type: (status, share or reason)}}."""
    lines = [
        "# Families",
        "",
        "What this project does with a tiny random model of every type of language model that transformers",
        f"{transformers.__version__} registers.",
        "",
        "- *Works*: block by block, loss and gradients are those of autograd on the whole model (within 1e-4);",
        "  Wanda's masks are those of a naive restatement; read from its files block by block, a model is pruned to",
        "  the very same weights; the checkpoint has the dense one's names, and plain transformers gives the pruned",
        "  model's logits with it. The number is the share of the (tiny) blocks' weights that can be pruned: the rest",
        "  is not a matrix product, or routes tokens to experts, and stays dense.",
        "- *Refused*: in this one line, before any work. Encoders are, and decoders whose `labels` are not shifted by",
        '  one, for their loss is not the next token\'s: "their loss is ... that of the whole model ...".',
        "- *Not made*: what is lacking for a tiny model of it alone.",
        "",
        "Written by `python scripts/families.py --output docs/families.md`.",
    ]
    for title, answers in found.items():
        works = sum(status == "works" for status, _ in answers.values())
        lines += ["", f"## {title}: {works} of {len(answers)} work", "", "| type | | share, or why not |", "|---|---|---|"]
        lines += [f"| {kind} | {status} | {text.replace('|', ' ')} |" for kind, (status, text) in answers.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> bool:
    """Try types one by one; returns whether any is wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model_type of a config (default: all)")
    parser.add_argument("--output", type=Path, help="write the page there, too")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    groups = {"Language models": TYPES, "Language models in multimodal wrappers": WRAPPERS}
    if args.types:
        groups = {"Types": args.types}
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for title, kinds in groups.items():
        for kind in kinds:
            status, text = found.setdefault(title, {})[kind] = isolated(kind)
            print(f"{kind}: {status}, {text}", flush=True)
    if args.output:
        args.output.write_text(page(found))
    answers = [status for answers in found.values() for status, _ in answers.values()]
    print(", ".join(f"{answers.count(status)} {status}" for status in dict.fromkeys(answers)))
    return "wrong" in answers or "crashed" in answers


if __name__ == "__main__":
    sys.exit(main())
