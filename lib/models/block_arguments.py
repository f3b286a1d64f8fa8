"""What a model's forward passes to its blocks besides the hidden state, and what blocks leave there for later ones.

Masks and rotary tables are equal for all samples of one length, which share them. What is computed from the tokens, such as
the per-layer inputs of Gemma 3n and 4, belongs to one sample, and can be larger than its hidden state.

A mapping that is empty when the first block is called is there to be filled: in Gemma 3n and 4, blocks share keys and values
this way. Each sample has a mapping of its own. When gradients are computed, what is put into it is one more output of the
block that fills it, and one more input of the blocks that read it.
"""

from collections.abc import MutableMapping
from copy import copy

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lib.models.host import mapped

Arguments = list[dict]  # {name: value} for every block
Carried = dict[str, MutableMapping]  # name of the argument -> the mapping that blocks fill
Place = tuple[str, object, int]  # name of the argument, key in the mapping, number of the tensor in the value


def shared(new: Arguments, old: Arguments) -> Arguments:
    """`new`, in which values that equal those in the same place of `old` are replaced by the latter; `old` itself if all are.

    A GPU is asked once whether all tensors are equal, and a second time, which of them, only if some are not.
    """
    ours, shape = tree_flatten(new)
    theirs, other = tree_flatten(old)
    if shape != other:
        return new
    pairs = {(id(a), id(b)): (a == b).all() for a, b in zip(ours, theirs, strict=True) if a is not b and _alike(a, b)}
    answers = torch.stack(list(pairs.values())) if pairs else torch.ones(0)
    equal = dict.fromkeys(pairs, True) if answers.all().item() else dict(zip(pairs, answers.tolist(), strict=True))
    values = [b if _same(a, b, equal) else a for a, b in zip(ours, theirs, strict=True)]
    return old if all(a is b for a, b in zip(values, theirs, strict=True)) else tree_unflatten(values, shape)


def unshared(arguments: Arguments, other: Arguments) -> list[torch.Tensor]:
    """The tensors in `arguments` that are not in `other` as well, each once."""
    others = {id(value) for value in tree_flatten(other)[0]}
    values = {id(value): value for value in tree_flatten(arguments)[0] if isinstance(value, torch.Tensor)}
    return [value for key, value in values.items() if key not in others]


def in_file(arguments: Arguments, other: Arguments) -> Arguments:
    """`arguments` with the tensors that are not in `other` moved to temporary files, one for each dtype."""
    slots: dict[int, torch.Tensor] = {}
    tensors = unshared(arguments, other)
    for dtype in {tensor.dtype for tensor in tensors}:
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        sizes = [tensor.numel() for tensor in alike]
        for tensor, slot in zip(alike, mapped((sum(sizes),), dtype).split(sizes), strict=True):
            slots[id(tensor)] = slot.view(tensor.shape).copy_(tensor)
    values, shape = tree_flatten(arguments)
    return tree_unflatten([slots.get(id(value), value) for value in values], shape)


def on(device: torch.device, arguments: dict) -> dict:
    """One block's arguments with their tensors on `device`. A value that is there already stays the same object."""
    on_device = {}
    for name, value in arguments.items():
        parts, shape = tree_flatten(value)
        moved = [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]
        on_device[name] = value if all(a is b for a, b in zip(moved, parts, strict=True)) else tree_unflatten(moved, shape)
    return on_device


def _alike(a, b) -> bool:
    """Whether two values are tensors that may be equal."""
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _same(a, b, equal: dict[tuple[int, int], bool]) -> bool:
    if a is b or isinstance(a, torch.Tensor):
        return a is b or equal.get((id(a), id(b)), False)
    return type(a) is type(b) and a == b


def split(kwargs: list[dict]) -> tuple[list[dict], Carried]:
    """Every block's arguments without the mappings that blocks fill, and new copies of these mappings."""
    names = {
        name
        for arguments in kwargs
        for name, value in arguments.items()
        if isinstance(value, MutableMapping) and not value and sum(value is other.get(name) for other in kwargs) > 1
    }
    carried = {name: copy(next(arguments[name] for arguments in kwargs if name in arguments)) for name in names}
    rest = [{name: value for name, value in arguments.items() if name not in names} for arguments in kwargs]
    return rest, carried


def snapshot(carried: Carried) -> Carried:
    """Copies of the mappings as they are now, without what is put into the originals later."""
    return {name: copy(mapping) for name, mapping in carried.items()}


def with_leaves(carried: Carried) -> tuple[Carried, dict[Place, torch.Tensor]]:
    """Copies of the mappings for one run of a block with a graph, and the tensors in them, all leaves, by their places."""
    lent, leaves = snapshot(carried), {}
    for name, mapping in lent.items():
        for key, value in mapping.items():
            tensors, shape = tree_flatten(value)
            for number, tensor in enumerate(tensors):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensors[number] = leaves[name, key, number] = tensor.detach().requires_grad_()
            mapping[key] = tree_unflatten(tensors, shape)
    return lent, leaves


def left(lent: Carried, leaves: dict[Place, torch.Tensor]) -> dict[Place, torch.Tensor]:
    """The tensors with a graph that a block has put into the mappings of `with_leaves`, by their places."""
    outputs = {}
    for name, mapping in lent.items():
        for key, value in mapping.items():
            for number, tensor in enumerate(tree_flatten(value)[0]):
                place = (name, key, number)
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor is not leaves.get(place):
                    outputs[place] = tensor
    return outputs


def keep(carried: Carried, lent: Carried) -> None:
    """Put into a sample's mappings what a block has left in `lent`, detached from its graph."""
    for name, mapping in lent.items():
        for key, value in mapping.items():
            tensors, shape = tree_flatten(value)
            cut = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
            carried[name][key] = tree_unflatten(cut, shape)
