"""The weights of a block that can be pruned: matrices that inputs are multiplied with, each seen as (out, in).

A matrix is the weight of a linear module, or one matrix of a stack (E, out, in), which is how mixtures of experts store their
weights. Either may be stored transposed. Weights that are not used in a matrix product (convolutions, state-space parameters,
norms) stay dense, and so do routers, which send tokens to experts.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lib.errors import InvalidInput

# Classes whose stacks are (E, in, out) although they have no attribute `is_transposed` that says so.
TRANSPOSED = ("Llama4TextExperts", "RecurrentGemmaRglru")
NO_PRODUCTS = ("A_log",)  # parameters of three dimensions that are not multiplied as matrices
BLOCK_DIAGONAL = ("DeepseekV4GroupedLinear",)  # linears in which every group of outputs has separate inputs
ROUTERS = ("router", "gate", "shared_expert_gate")  # names of modules beside experts that send tokens to them

Seen = Callable[[str, torch.Tensor], None]  # called with (name of a matrix, its inputs (..., in))


@dataclass(frozen=True)
class Matrix:
    """One prunable weight of a block."""

    name: str  # inside the block, such as "self_attn.q_proj" or "mlp.experts.3.down_proj"
    module: nn.Module
    parameter: str  # its name in the module
    index: int | None = None  # in a stack; None: it is not in a stack
    transposed: bool = False  # stored as (in, out)
    router: bool = False

    @property
    def stored(self) -> torch.Tensor:
        """The matrix as the module stores it; shares the module's memory."""
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
        """Name in the block's state of the tensor that holds the matrix."""
        owner = self.name.rpartition(".")[0] if self.parameter != "weight" or self.index is not None else self.name
        return f"{owner.removesuffix(f'.{self.index}')}.{self.parameter}" if owner else self.parameter

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This matrix as (out, in), from another tensor of its parameter's shape, whose memory it shares."""
        return self.oriented(whole if self.index is None else whole[self.index])

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the stored shape, such as a gradient, as (out, in)."""
        return tensor.mT if self.transposed else tensor


def matrices_of(block: nn.Module) -> dict[str, Matrix]:
    """{name: matrix} of all that can be pruned in a block, routers included, in the order of the block's modules."""
    matrices = []
    for path, module in block.named_modules():
        if _is_linear(module) and type(module).__name__ not in BLOCK_DIAGONAL:
            matrices.append(Matrix(path, module, "weight", None, _is_conv1d(module), _is_router(block, path)))
        elif not type(module).__module__.startswith("torch.nn"):
            for name, parameter in module.named_parameters(recurse=False):
                if (
                    parameter.ndim == 3
                    and min(parameter.shape[1:]) > 1
                    and name not in NO_PRODUCTS
                    and not name.endswith("bias")
                ):
                    transposed = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED)
                    prefix = f"{path}." if path else ""
                    matrices += [Matrix(f"{prefix}{e}.{name}", module, name, e, transposed) for e in range(len(parameter))]
                elif parameter.ndim == 2 and name == "weight" and "Router" in type(module).__name__:
                    matrices.append(Matrix(path, module, name, router=True))
    return {matrix.name: matrix for matrix in matrices if matrix.shape.numel()}  # a part that a config turns off may be empty


@contextmanager
def products(
    matrices: dict[str, Matrix], seen: Seen | None = None, leaves: dict[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """Inside the context, every product of a matrix and its inputs is observed.

    Args:
        matrices: those of one block.
        seen: called with the name of the matrix and its inputs (..., in); a matrix of a stack has those routed to it.
        leaves: filled with {name: tensor of the stored shape}, for which autograd computes gradients: the weight itself, or
            for each matrix of a stack that takes part in a product, a separate tensor.
    """
    handles, watched = [], []
    for name, matrix in matrices.items():
        if matrix.index is None and leaves is not None:
            leaves[name] = matrix.stored
        if _multiplies_itself(matrix.module):
            if seen is not None:
                handles.append(matrix.module.register_forward_pre_hook(lambda module, args, name=name: seen(name, args[0])))
        elif matrix.index is not None or seen is not None:
            watched.append(matrix)
    try:
        with _Watch(watched, seen, leaves) if watched else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Observes products with matrices, which it knows by their memory, however a forward takes them out of modules.

    With `leaves`, a matrix of a stack is multiplied as a separate tensor. Autograd then makes gradients only for matrices that
    tokens were routed to, and none of the size of the stack.
    """

    def __init__(self, matrices: list[Matrix], seen: Seen | None, leaves: dict[str, torch.Tensor] | None):
        super().__init__()
        self.matrices = {matrix.stored.data_ptr(): matrix for matrix in matrices}
        self.stacks: dict[int, list[Matrix]] = {}
        for matrix in matrices:
            if matrix.index is not None:
                self.stacks.setdefault(getattr(matrix.module, matrix.parameter).data_ptr(), []).append(matrix)
        self.seen = seen
        self.leaves = leaves

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = list(args), dict(kwargs or {})
        if func in _PRODUCTS:
            names = _PRODUCTS[func]
            args += [kwargs.pop(name) for name in names[len(args) :]]
            left, right = len(names) - 2, len(names) - 1
            linear = func is torch.nn.functional.linear
            args[right] = self._look(args[right], args[left], not linear)
            if not linear and args[right].ndim > 1:  # the matrix may also be on the left, with its inputs as columns
                args[left] = self._look(args[left], args[right].mT, False)
        return func(*args, **kwargs)

    def _look(self, weight: torch.Tensor, inputs: torch.Tensor, inputs_first: bool) -> torch.Tensor:
        """Report a product if `weight` is a matrix or a whole stack; returns what to multiply with instead of `weight`.

        If `inputs_first`, `weight` is used as (..., in, out), otherwise as (..., out, in).
        """
        matrix = self.matrices.get(weight.data_ptr()) if weight.ndim > 1 else None
        if matrix is None:
            return weight
        stored = matrix.stored
        flipped = weight.stride()[-2:] != stored.stride()
        if weight.shape[-2:] != (stored.mT if flipped else stored).shape:
            return weight  # only a part of the matrix
        stack: list[Matrix] = []
        if any(weight.stride()[:-2]) and weight.numel() > stored.numel():
            stack = self.stacks.get(weight.data_ptr(), [])
            if weight.numel() != getattr(matrix.module, matrix.parameter).numel():
                return weight  # only a part of the stack
        if matrix.transposed != (inputs_first != flipped):
            where = f"{type(matrix.module).__name__}.{matrix.parameter}"
            raise InvalidInput(f"{where} is not stored the way round that matrices.TRANSPOSED says: correct that list")
        rows = _rows(inputs) if stack else None
        has_rows = None if rows is None else rows.flatten(1).any(dim=1).tolist()
        reached = [one for one in stack or [matrix] if has_rows is None or has_rows[one.index]]
        for one in reached if self.seen is not None else ():
            self.seen(one.name, inputs if rows is None else inputs[one.index][rows[one.index]])
        if self.leaves is None or matrix.index is None:
            return weight
        if stack:
            parts = list(getattr(matrix.module, matrix.parameter).detach().unbind())
            for one in reached:
                parts[one.index] = self._leaf(one)
            factor = torch.stack(parts)
        else:
            factor = self._leaf(matrix)
        factor = factor.mT if flipped else factor
        return factor.reshape(weight.shape) if stack else factor.expand_as(weight)

    def _leaf(self, matrix: Matrix) -> torch.Tensor:
        if matrix.name not in self.leaves:
            self.leaves[matrix.name] = matrix.stored.requires_grad_()
        return self.leaves[matrix.name]


def _rows(inputs: torch.Tensor) -> torch.Tensor | None:
    """(E, T): which inputs (E, T, in) of a whole stack were routed to each matrix; None if all matrices share their inputs.

    Inputs of tokens that were sent to other experts are zeros, as in Llama 4. An expert with only zeros was not reached.
    """
    return None if inputs.ndim < 3 or len(inputs) == 1 else inputs.detach().any(dim=-1)


_PRODUCTS = {  # function -> names of its arguments, of which the last two are multiplied
    torch.nn.functional.linear: ("input", "weight"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), ("input", "other")),
    **dict.fromkeys((torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), ("input", "batch1", "batch2")),
}


def kind_of(name: str) -> str:
    """A name with "*" for its numbers, which is the same for all experts of a mixture."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def idle(names: Collection[str], reached: Collection[str]) -> tuple[list[str], list[str]]:
    """The matrices of a block that no token reached: (experts of a mixture in which others were reached, all the rest)."""
    kinds = {kind_of(name) for name in reached}
    unreached = [name for name in names if name not in reached]
    experts = [name for name in unreached if kind_of(name) in kinds]
    return experts, [name for name in unreached if kind_of(name) not in kinds]


def _multiplies_itself(module: nn.Module) -> bool:
    """Whether a linear has a special forward, which may multiply with a tensor that is not the memory of its weight."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear that stores (in, out), as in GPT-2. Told by name: transformers is a slow import."""
    return any(kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__)


def _is_router(block: nn.Module, path: str) -> bool:
    """Whether a linear is, or belongs to, a router that has experts beside it."""
    parts = path.split(".")
    for k, part in enumerate(parts):
        if part in ROUTERS:
            beside = block.get_submodule(".".join(parts[:k]))
            return any("expert" in f"{name}.{type(module).__name__}".lower() for name, module in beside.named_modules())
    return False
