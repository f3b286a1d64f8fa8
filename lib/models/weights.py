"""The weights of a block that can be pruned: matrices that inputs are multiplied with, each seen as (out, in).

A matrix is the weight of a linear module, or one of a stack (E, out, in) as mixtures of experts keep theirs; either may be
stored the other way round. What is no matrix product (convolutions, state-space parameters, norms) and what routes tokens
to experts stays dense.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Stacks of these classes are (E, in, out), and nothing about the class says so (others have an `is_transposed`).
TRANSPOSED = ("Llama4TextExperts", "RecurrentGemmaRglru")
ROUTERS = ("router", "gate", "shared_expert_gate", "wg")  # names of linears that send tokens to experts

Seen = Callable[[str, torch.Tensor], None]  # (name of a matrix, its inputs (..., in))


@dataclass(frozen=True)
class Matrix:
    """One prunable weight of a block. `name`: inside the block, as "self_attn.q_proj" or "mlp.experts.3.down_proj"."""

    name: str
    module: nn.Module
    parameter: str
    index: int | None = None  # in a stack
    transposed: bool = False  # stored as (in, out)
    router: bool = False

    @property
    def stored(self) -> torch.Tensor:
        """As the module has it; shares its memory."""
        whole = getattr(self.module, self.parameter)
        return whole if self.index is None else whole.detach()[self.index]

    @property
    def weight(self) -> torch.Tensor:
        """(out, in); shares the module's memory."""
        return self.oriented(self.stored)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.weight.shape

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def tensor_name(self) -> str:
        """Of the tensor inside the block's state that holds it."""
        owner = self.name.rpartition(".")[0] if self.parameter != "weight" or self.index is not None else self.name
        return f"{owner.removesuffix(f'.{self.index}')}.{self.parameter}" if owner else self.parameter

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the stored shape, such as a gradient, as (out, in)."""
        return tensor.mT if self.transposed else tensor


def matrices_of(block: nn.Module) -> dict[str, Matrix]:
    """{name: matrix} of all that can be pruned in a block, routers included, in the block's own order."""
    matrices = []
    for path, module in block.named_modules():
        if _is_linear(module):
            router = path.rpartition(".")[2] in ROUTERS and _has_experts(block, path)
            matrices.append(Matrix(path, module, "weight", None, _is_conv1d(module), router))
        elif not type(module).__module__.startswith("torch.nn"):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and not name.endswith("bias"):
                    transposed = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED)
                    prefix = f"{path}." if path else ""
                    matrices += [Matrix(f"{prefix}{e}.{name}", module, name, e, transposed) for e in range(len(parameter))]
                elif parameter.ndim == 2 and name == "weight" and "Router" in type(module).__name__:
                    matrices.append(Matrix(path, module, name, router=True))
    return {matrix.name: matrix for matrix in matrices}


def dense_tensors(block: nn.Module) -> dict[str, int]:
    """{name: number of weights} of what stays dense in a block by its nature, the largest first; vectors are not counted."""
    prunable = {id(getattr(matrix.module, matrix.parameter)) for matrix in matrices_of(block).values() if not matrix.router}
    dense = Counter({n: p.numel() for n, p in block.named_parameters() if p.ndim > 1 and id(p) not in prunable})
    return dict(dense.most_common())


@contextmanager
def products(
    matrices: dict[str, Matrix], seen: Seen | None = None, leaves: dict[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """While open, every product of a matrix and its inputs is observed.

    Args:
        matrices: of one block.
        seen: is called with the name of the matrix and its inputs (..., in), for one of a stack those that were routed to it.
        leaves: is filled with {name: tensor of the stored shape} that autograd gives gradients for, of stacks for each
            matrix that took part; linears have their own weights.
    """
    handles, watched = [], {}
    for name, matrix in matrices.items():
        if matrix.index is None and leaves is not None:
            leaves[name] = matrix.stored
        if _is_linear(matrix.module):
            if seen is not None:
                handles.append(matrix.module.register_forward_pre_hook(lambda module, args, name=name: seen(name, args[0])))
        else:
            watched.setdefault(id(getattr(matrix.module, matrix.parameter)), []).append(matrix)
    try:
        with _Watch(watched, seen, leaves) if watched else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Gives one matrix of a stack a tensor of its own when a forward takes it out, and watches for its products.

    Autograd then has gradients for the matrices that tokens were routed to, and none of the size of the stack.
    """

    def __init__(self, parameters: dict[int, list[Matrix]], seen: Seen | None, leaves: dict[str, torch.Tensor] | None):
        super().__init__()
        self.stacks = {key: matrices for key, matrices in parameters.items() if matrices[0].index is not None}
        self.single = {key: matrices[0] for key, matrices in parameters.items() if matrices[0].index is None}
        self.seen = seen
        self.leaves = leaves
        self.own: dict[str, torch.Tensor] = {}  # name of a matrix of a stack -> the tensor that stands for it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _TAKING and id(args[0]) in self.stacks:
            matrices = {matrix.index: matrix for matrix in self.stacks[id(args[0])]}
            index = args[1]
            if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool):
                matrix = matrices.get(int(index))
                if matrix is not None:
                    return self._tensor_of(matrix)
        elif func in _PRODUCTS:
            inputs, weight, transposed = _PRODUCTS[func](*args, **kwargs)
            if id(weight) in self.single:
                _require_orientation(self.single[id(weight)], transposed)
                if self.seen is not None:
                    self.seen(self.single[id(weight)].name, inputs)
            elif id(weight) in self.stacks:
                matrices = self.stacks[id(weight)]
                _require_orientation(matrices[0], transposed)
                if self.seen is not None:
                    for matrix in matrices:
                        self.seen(matrix.name, inputs[matrix.index])
                if self.leaves is not None:
                    parts = list(weight.detach().unbind())
                    for matrix in matrices:
                        parts[matrix.index] = self._tensor_of(matrix)
                    args = tuple(torch.stack(parts) if arg is weight else arg for arg in args)
        return func(*args, **kwargs)

    def _tensor_of(self, matrix: Matrix) -> torch.Tensor:
        if matrix.name not in self.own:
            tensor = matrix.stored
            if self.leaves is not None:
                tensor = self.leaves[matrix.name] = tensor.requires_grad_()
            self.own[matrix.name] = tensor
            self.single[id(tensor)] = matrix
        return self.own[matrix.name]


def _require_orientation(matrix: Matrix, transposed: bool) -> None:
    if matrix.transposed != transposed:
        where = f"{type(matrix.module).__name__}.{matrix.parameter}"
        raise ValueError(f"{where} is stored the other way round than thought: weights.TRANSPOSED has to say so")


def _linear(input, weight, bias=None):
    return input, weight, False


def _matmul(input, other, **kwargs):
    return input, other, True


def _addmm(input, mat1, mat2, **kwargs):
    return mat1, mat2, True


_TAKING = {torch.Tensor.__getitem__, torch.Tensor.select, torch.select}
_PRODUCTS = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.addmm: _addmm,
    torch.baddbmm: _addmm,
}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear that stores (in, out), as in GPT-2; looked up by name, for transformers is large."""
    return any(kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__)


def _has_experts(block: nn.Module, path: str) -> bool:
    """Whether a linear stands beside experts."""
    owner = block.get_submodule(path.rpartition(".")[0])
    return any("expert" in name for name, _ in owner.named_modules()) or any("expert" in n for n, _ in owner.named_parameters())
