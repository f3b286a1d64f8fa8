"""The weights of a block that can be pruned: matrices that inputs are multiplied with, each seen as (out, in).

A matrix is the weight of a linear module, or one of a stack (E, out, in) as mixtures of experts keep theirs; either may be
stored the other way round. What is not a matrix product (convolutions, state-space parameters, norms) and what routes tokens
to experts stays dense.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lib.errors import InvalidInput

# Stacks of these classes are (E, in, out), and nothing about the class says so (others have an `is_transposed`).
TRANSPOSED = ("Llama4TextExperts", "RecurrentGemmaRglru")
NO_PRODUCTS = ("A_log",)  # parameters of three dimensions that nothing is multiplied with as a matrix
BLOCK_DIAGONAL = ("DeepseekV4GroupedLinear",)  # linears of which every group of outputs has inputs of its own
ROUTERS = ("router", "gate", "shared_expert_gate")  # names of modules beside experts that send tokens to them

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

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This matrix, (out, in), in a tensor of the shape of the parameter that holds it; shares its memory."""
        return self.oriented(whole if self.index is None else whole[self.index])

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the stored shape, such as a gradient, as (out, in)."""
        return tensor.mT if self.transposed else tensor


def matrices_of(block: nn.Module) -> dict[str, Matrix]:
    """{name: matrix} of all that can be pruned in a block, routers included, in the block's own order."""
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
    return {matrix.name: matrix for matrix in matrices if matrix.shape.numel()}  # a part that a config turns off may have none


@contextmanager
def products(
    matrices: dict[str, Matrix], seen: Seen | None = None, leaves: dict[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """While open, every product of a matrix and its inputs is observed.

    Args:
        matrices: of one block.
        seen: is called with the name of the matrix and its inputs (..., in), for one of a stack those that were routed to it.
        leaves: is filled with {name: tensor of the stored shape} that autograd gives gradients for, of stacks for each
            matrix that took part; other matrices have their own weights.
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
    """Watches for products with matrices, which are known by their memory, however a forward takes them out of modules.

    A product with one of a stack is made with a tensor of its own instead: autograd then has gradients for the matrices that
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
            if not linear and args[right].ndim > 1:  # the matrix may also stand on the left, its inputs being columns
                args[left] = self._look(args[left], args[right].mT, False)
        return func(*args, **kwargs)

    def _look(self, weight: torch.Tensor, inputs: torch.Tensor, inputs_first: bool) -> torch.Tensor:
        """Report a product if it is one with a matrix or a whole stack; returns what to multiply with.

        `inputs_first`: `weight` is used as (..., in, out), otherwise as (..., out, in).
        """
        matrix = self.matrices.get(weight.data_ptr()) if weight.ndim > 1 else None
        if matrix is None:
            return weight
        stored = matrix.stored
        flipped = weight.stride()[-2:] != stored.stride()
        if weight.shape[-2:] != (stored.mT if flipped else stored).shape:
            return weight  # a part of it
        stack: list[Matrix] = []
        if any(weight.stride()[:-2]) and weight.numel() > stored.numel():
            stack = self.stacks.get(weight.data_ptr(), [])
            if weight.numel() != getattr(matrix.module, matrix.parameter).numel():
                return weight  # a part of the stack
        if matrix.transposed != (inputs_first != flipped):
            where = f"{type(matrix.module).__name__}.{matrix.parameter}"
            raise InvalidInput(f"{where} is stored the other way round than thought: weights.TRANSPOSED has to say so")
        rows = _rows(inputs) if stack else None
        some = None if rows is None else rows.flatten(1).any(dim=1).tolist()
        reached = [one for one in stack or [matrix] if some is None or some[one.index]]
        for one in reached if self.seen is not None else ():
            self.seen(one.name, inputs if rows is None else inputs[one.index][rows[one.index]])
        if self.leaves is None or matrix.index is None:
            return weight
        if stack:
            parts = list(getattr(matrix.module, matrix.parameter).detach().unbind())
            for one in reached:
                parts[one.index] = self._leaf(one)
            own = torch.stack(parts)
        else:
            own = self._leaf(matrix)
        own = own.mT if flipped else own
        return own.reshape(weight.shape) if stack else own.expand_as(weight)

    def _leaf(self, matrix: Matrix) -> torch.Tensor:
        if matrix.name not in self.leaves:
            self.leaves[matrix.name] = matrix.stored.requires_grad_()
        return self.leaves[matrix.name]


def _rows(inputs: torch.Tensor) -> torch.Tensor | None:
    """Which inputs (E, T, in) of a whole stack are its matrices' own, (E, T); None if all matrices share theirs.

    Those of tokens that were sent to other experts are zeros, as in Llama 4: an expert that has no others was not reached.
    """
    return None if inputs.ndim < 3 or len(inputs) == 1 else inputs.detach().any(dim=-1)


_PRODUCTS = {
    torch.nn.functional.linear: ("input", "weight"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), ("input", "other")),
    **dict.fromkeys((torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), ("input", "batch1", "batch2")),
}


def kind_of(name: str) -> str:
    """A name without the numbers in it, by which experts of a mixture differ."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def idle(names: Collection[str], reached: Collection[str]) -> tuple[list[str], list[str]]:
    """Of the matrices of a block, those that no token reached: experts beside others that were reached, and all the rest."""
    kinds = {kind_of(name) for name in reached}
    unreached = [name for name in names if name not in reached]
    experts = [name for name in unreached if kind_of(name) in kinds]
    return experts, [name for name in unreached if kind_of(name) not in kinds]


def _multiplies_itself(module: nn.Module) -> bool:
    """Whether a linear has a forward of its own: with what it makes of its weight, its product cannot be told by memory."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear that stores (in, out), as in GPT-2; looked up by name, for transformers is large."""
    return any(kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__)


def _is_router(block: nn.Module, path: str) -> bool:
    """Whether a linear is, or is a part of, a router that stands beside experts."""
    parts = path.split(".")
    for k, part in enumerate(parts):
        if part in ROUTERS:
            beside = block.get_submodule(".".join(parts[:k]))
            return any("expert" in f"{name}.{type(module).__name__}".lower() for name, module in beside.named_modules())
    return False
