"""What blocks leave for later blocks beside the hidden state: tensors put into a mapping that all of them are given.

Gemma 3n and Gemma 4 share keys and values so. A mapping that is empty when the first block is called is one to be filled; each
sample has its own. For a gradient it is one more output of the block that fills it, and one more input of those that read it.
"""

from collections.abc import MutableMapping
from copy import copy

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

Carried = dict[str, MutableMapping]  # name of the argument -> the mapping
Place = tuple[str, object, int]  # argument, key in the mapping, number of the tensor in the value


def split(kwargs: list[dict]) -> tuple[list[dict], Carried]:
    """Every block's arguments without the mappings that are to be filled, and those, new ones."""
    names = {
        name
        for own in kwargs
        for name, value in own.items()
        if isinstance(value, MutableMapping) and not value and sum(value is other.get(name) for other in kwargs) > 1
    }
    carried = {name: copy(next(own[name] for own in kwargs if name in own)) for name in names}
    return [{name: value for name, value in own.items() if name not in names} for own in kwargs], carried


def snapshot(carried: Carried) -> Carried:
    """The mappings as they are now: what is put into the others later is not in these."""
    return {name: copy(mapping) for name, mapping in carried.items()}


def with_leaves(carried: Carried) -> tuple[Carried, dict[Place, torch.Tensor]]:
    """Copies for one run of a block with a graph, every tensor in them a leaf of it, and those leaves by their places."""
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
    """What a block has put into mappings of `with_leaves`: tensors with a graph, by their places."""
    found = {}
    for name, mapping in lent.items():
        for key, value in mapping.items():
            for number, tensor in enumerate(tree_flatten(value)[0]):
                place = (name, key, number)
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor is not leaves.get(place):
                    found[place] = tensor
    return found


def keep(carried: Carried, lent: Carried) -> None:
    """Put into a sample's mappings what a block has left in `lent`, cut from its graph."""
    for name, mapping in lent.items():
        for key, value in mapping.items():
            tensors, shape = tree_flatten(value)
            cut = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
            carried[name][key] = tree_unflatten(cut, shape)
