"""Wanda's and SparseGPT's results against other people's code: llm-compressor's functions, and the format of 2:4 kernels."""

import importlib.util
import logging
import sys
import types

import pytest
import torch
from conftest import DEMO, ROOT, needs_demo
from torch import nn

from lib.data.sources import documents
from lib.data.windows import calibration_windows
from lib.models import loading
from lib.models.tokenizer import load_tokenizer
from lib.pruning import scores
from lib.pruning.masks import Sparsity, mask_of
from lib.pruning.statistics import ActivationNorm, Hessian, observe
from lib.pruning.updates.sparsegpt import solve

pytestmark = [pytest.mark.slow, needs_demo, pytest.mark.usefixtures("all_processors")]
N, T = 4, 512
DAMPING = 0.01
HALF_ULP = 2.0**-24  # largest relative error of one rounding to fp32
PATTERNS = {"unstructured": (0.5, 0, 0), "2:4": (0.5, 2, 4), "4:8": (0.5, 4, 8)}  # in llm-compressor's terms: share, n, m


@pytest.fixture(scope="module")
def alone():
    """A function: one module's file to the module, without its package, whose pinned dependencies are not ours."""
    sys.modules.setdefault("loguru", types.SimpleNamespace(logger=logging.getLogger("loguru")))

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    if isinstance(sys.modules["loguru"], types.SimpleNamespace):
        del sys.modules["loguru"]


@pytest.fixture(scope="module")
def pruning(unpacked):
    sha256 = "be59276d4b239cbde9d11fd1ea064417306b430fb5a9412b140cce514976a0ea"
    return unpacked("llmcompressor==0.14.0", sha256) / "llmcompressor" / "modifiers" / "pruning"


@pytest.fixture(scope="module")
def compressed(unpacked):
    sha256 = "5c2dcfd9cd820521906e23e096a51d68755cb88b67e19b1a5c9e11fa69637fb2"
    return unpacked("compressed-tensors==0.19.0", sha256) / "compressed_tensors" / "utils"


@pytest.fixture
def entered():
    """The demo model and N samples before its first block."""
    docs = documents(str(ROOT / "demo" / "calibration.jsonl"))
    windows = calibration_windows(docs, load_tokenizer(str(DEMO)), N, T, seed=0)
    decoder = loading.load(str(DEMO), dtype="float32", device="cpu")
    return decoder, decoder.enter_all(windows)


def statistics_of(decoder, i, states, ours, empty, accumulate):
    """Run block `i` once; its inputs' statistics by our class and by llm-compressor's functions: {linear: tensor} each."""
    linears = decoder.linears(i)
    theirs = {name: (empty(linear.module), 0) for name, linear in linears.items()}

    def hook(name):
        def record(module, args):
            theirs[name] = accumulate(args[0], module, *theirs[name])

        return record

    handles = [linear.module.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    with torch.no_grad(), observe(linears, ours) as seen:
        for state in states:
            decoder.run(i, state.hidden, state.kwargs[i])
    for handle in handles:
        handle.remove()
    results = {id(one): one.result(N) for one in {id(one): one for one in seen.values()}.values()}  # which linears share
    return {name: results[id(one)] for name, one in seen.items()}, {name: total for name, (total, _) in theirs.items()}


def only_ties_differ(score, ours, theirs, m) -> bool:
    """Whether every group of `m` keeps the same scores: torch.topk takes any of several equal ones, ours the left.

    Among 26 million groups of four, a tie or so is to be expected. Without `m` both sides sort stably: nothing may differ.
    """
    if m is None:
        return False
    kept = [torch.where(weight != 0, score, 0).view(-1, m).sort(dim=1).values for weight in (ours, theirs)]
    return torch.equal(*kept)


@torch.no_grad()
def test_wanda_in_every_block(entered, pruning, compressed, alone):
    theirs, helpers = alone(pruning / "wanda" / "wanda_sparsify.py"), alone(compressed / "helpers.py")
    kernels = alone(compressed / "semi_structured_conversions.py")
    decoder, states = entered
    differing = total = ties = 0
    for i in range(len(decoder)):
        own, scalars = statistics_of(
            decoder, i, states, ActivationNorm, theirs.make_empty_row_scalars, theirs.accumulate_row_scalars
        )
        for name, linear in decoder.linears(i).items():
            assert torch.allclose(own[name].x_norm.square(), scalars[name], rtol=1e-5)
            for pattern, arguments in PATTERNS.items():
                sparsity = Sparsity.parse(pattern, 0.5)
                expected = theirs.sparsify_weight(linear.module, {linear.module: scalars[name].clone()}, *arguments)
                # Compared as weights: among weights that are zero already, which of them a mask names does not matter.
                score = scores.wanda(linear.weight, scalars[name].sqrt())
                same_norms = linear.weight.masked_fill(mask_of(score, sparsity), 0)
                if not torch.equal(same_norms, expected):
                    assert only_ties_differ(score, same_norms, expected, sparsity.m), f"block {i} {name} {pattern}"
                    ties += 1
                pruned = linear.weight.masked_fill(mask_of(scores.wanda(linear.weight, own[name].x_norm), sparsity), 0)
                differing, total = differing + (pruned != expected).sum().item(), total + pruned.numel()
                if pattern == "2:4":
                    assert helpers.tensor_follows_mask_structure(pruned, "2:4")
                    half = pruned.half()  # in two bytes a weight: four bytes would be packed 1:2
                    packed = kernels.sparse_semi_structured_from_dense_cutlass(half)
                    assert torch.equal(kernels.sparse_semi_structured_to_dense_cutlass(*packed), half)
                    chosen = pruned
            linear.weight.copy_(chosen)
        decoder.advance(i, states)
    print(f"{differing} of {total} weights differ where each side takes the norms of the inputs itself")
    assert ties <= 3
    assert differing <= 1e-6 * total


def squared_error(weight, dense, hessian) -> float:
    """`tr((W - W0) H (W - W0)^T)`: what SparseGPT minimises."""
    change = weight.double() - dense.double()
    return ((change @ hessian) * change).sum().item()


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_in_the_first_block(entered, pruning, alone, pattern):
    """Equal in float64. In fp32, where rounding decides between weights of nearly equal score, as good as in float64."""
    theirs = alone(pruning / "sparsegpt" / "sgpt_sparsify.py")
    theirs.SGPT_PRECISION = torch.float64
    decoder, states = entered
    sparsity = Sparsity.parse(pattern, 0.5)
    own, hessians = statistics_of(decoder, 0, states, Hessian, theirs.make_empty_hessian, theirs.accumulate_hessian)
    for name, linear in decoder.linears(0).items():
        hessian, width = hessians[name], linear.in_features
        norms = hessian.diagonal().sqrt()
        # N * T products, added in any order: at worst as many roundings, each of at most |x_i| |x_j| (Cauchy-Schwarz).
        assert ((own[name].hessian - hessian).abs() <= N * T * HALF_ULP * torch.outer(norms, norms)).all()

        exact = nn.Linear(width, linear.shape[0], dtype=torch.float64)
        exact.weight = nn.Parameter(linear.weight.double(), requires_grad=False)
        _, expected = theirs.sparsify_weight(exact, {exact: hessian.clone()}, *PATTERNS[pattern], 128, DAMPING, False)
        solved = solve(exact.weight, hessian.clone(), sparsity)
        assert torch.equal(solved == 0, expected == 0), name
        assert (solved - expected).norm() < 1e-9 * expected.norm(), name

        # The damped Hessian's condition number is at most width / DAMPING + 1: no fp32 inverse need be better than that.
        pruned, slack = solve(linear.weight, own[name].hessian.clone(), sparsity), (width / DAMPING + 1) * HALF_ULP
        best = squared_error(expected, linear.weight, hessian)
        assert squared_error(pruned, linear.weight, hessian) == pytest.approx(best, rel=slack), name
        assert ((pruned == 0).sum() - (expected == 0).sum()).abs() <= 1e-5 * pruned.numel(), name
