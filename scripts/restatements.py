"""Gradient norms and Wanda's masks restated on the whole model, to compare this project's with; for scripts/families.py.

Gradients are autograd's. For Wanda the whole model is run again for every block, and the inputs of a matrix are collected
wherever they meet its memory in a product. So neither depends on how this project runs a model block by block.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lib.gradients.walk import gradient_norms
from lib.models.decoder import Decoder
from lib.models.matrices import kind_of

SCALE = 100.0  # that gradients are multiplied with
TOLERANCE = 1e-4  # of a tensor's norm
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")


class Wrong(Exception):
    """A result is not what it must be."""


def compare_gradients(model: nn.Module, decoder: Decoder, windows: torch.Tensor) -> None:
    """Compare the loss, and the l2 norms of all matrices with the graph in memory and recomputed, with autograd on `model`.

    Raises:
        Wrong: one of them is off by more than TOLERANCE.
    """
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
                    expected = matrix.of(total).sqrt()
                    require_equal(f"the gradient norm of {decoder.prefixes[i]}{name}", norm, expected)


def compare_wanda(dense: nn.Module, decoder: Decoder, windows: torch.Tensor) -> None:
    """Compare a model that Wanda has pruned to 50 %, unstructured, with a restatement, which prunes `dense`.

    Raises:
        Wrong: more mask bits of a matrix differ than rounding explains.
    """
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    for i in range(len(decoder)):
        weights = {}
        for name, matrix in decoder.linears(i).items():
            weights[name] = matrix.of(parameters[decoder.prefixes[i] + matrix.tensor_name].detach())
        inputs = Inputs(weights)
        with inputs, torch.no_grad():
            for window in windows:
                dense(input_ids=window[None], use_cache=False)
        masks = {
            name: mask for name, weight in weights.items() if (mask := mask_of(name, weight, inputs, len(windows))) is not None
        }
        for name, mask in masks.items():
            weights[name].masked_fill_(mask, 0)
        for name, matrix in decoder.linears(i).items():
            differing = ((matrix.weight == 0) != (weights[name] == 0)).sum().item()
            if differing > 2 + 0.001 * weights[name].numel():  # rounding at the threshold flips a pair
                raise Wrong(
                    f"{differing} of {weights[name].numel()} mask bits of {decoder.prefixes[i]}{name} differ from wanda's"
                )
            weights[name].copy_(matrix.weight)  # so that later blocks see the same inputs


def mask_of(name: str, weight: torch.Tensor, inputs: "Inputs", samples: int) -> torch.Tensor | None:
    """The mask of a matrix, (out, in), True = remove; None if the matrix takes no part in the forward pass."""
    squares = inputs.squares.get(name, torch.zeros(weight.shape[1]))
    if name not in inputs.squares and not any(kind_of(other) == kind_of(name) for other in inputs.squares):
        return None
    norm = (squares / samples).sqrt()
    reached = norm.any() or kind_of(name) == name
    score = weight.abs() * (norm if reached else 1.0)  # an expert without tokens: by magnitude
    lowest = score.argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, lowest, True)


class Inputs(TorchFunctionMode):
    """While open, sums the squared inputs of matrices {name: (out, in)} over tokens, wherever their memory is multiplied with."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.names = {(weight.data_ptr(), weight.shape): name for name, weight in weights.items()}
        self.names |= {(weight.data_ptr(), weight.mT.shape): name for name, weight in weights.items()}
        self.squares: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in PRODUCTS:
            *_, left, right = [*args, *(kwargs or {}).values()][: 3 if "add" in func.__name__ else 2]
            self.look(left, right)
            if func.__name__ != "linear" and right.ndim > 1:
                self.look(right.mT, left)
        return func(*args, **(kwargs or {}))

    def look(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the squares of `inputs` to those of the matrix, or matrices of a stack, that `weight` is in memory."""
        stacked = weight.ndim > 2 and inputs.ndim > 2
        pairs = zip(inputs.expand(len(weight), *inputs.shape[1:]), weight, strict=True) if stacked else [(inputs, weight)]
        for x, w in pairs:
            name = self.names.get((w.data_ptr(), w.squeeze().shape))
            if name is not None:
                self.squares[name] = self.squares.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(dim=0)


def require_equal(what: str, computed: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise Wrong if a tensor differs from what is expected by more than TOLERANCE of its norm."""
    size = expected.double().norm().clamp(min=1e-6)
    error = ((computed.double() - expected.double()).norm() / size).item()
    if not error < TOLERANCE:
        raise Wrong(f"{what} is off by {error:.2g}")
