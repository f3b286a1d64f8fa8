"""How a model's forward runs its blocks: which ones, in which order, and what it hands from one to the next.

This is learnt from forward passes whose blocks do nothing but take notes, so that no family is a special case. What a model
does between its blocks would be lost when they are run one by one, so a model that does anything there is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature

import torch
from torch import nn
from transformers.cache_utils import Cache

from lib.errors import InvalidInput
from lib.models.host import is_device_fault, is_out_of_memory

MOST_RETURNED = 4  # values in the tuple that a block returns, at most

Call = tuple[torch.Tensor, dict]  # the hidden state that a block is called with, and its other arguments


@dataclass
class Chain:
    """What a model's forward takes from its blocks."""

    returned: int  # number of values in the tuple that a block returns; 0: no tuple, but the hidden state alone
    run: list[int] = field(default_factory=list)  # the blocks that the forward runs, in order
    # What blocks hand on besides hidden states: {block: {argument: (block that returned it, position in its tuple)}}
    takes: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def output(self, hidden: torch.Tensor, rest: list | None = None):
        """A value such as a block returns: the hidden state, and `rest` (by default Nones) besides."""
        return (hidden, *(rest or [None] * (self.returned - 1))) if self.returned else hidden

    def handed_on(self, i: int) -> list[tuple[int, int]]:
        """(i, position) of all that later blocks take of what block `i` returns."""
        return sorted({place for taken in self.takes.values() for place in taken.values() if place[0] == i})


class _Recorded(Exception):
    """Leaves the model's forward once the last block's arguments are known."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name of the list of a decoder's blocks, and the list.

    If there are several lists, it is one that is as long as the config says; of those, the least nested; of those, the one
    with the most weights.

    Raises:
        InvalidInput: there is no list.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)

    def rank(named: tuple[str, nn.ModuleList]) -> tuple:
        name, module = named
        return len(module) == count, -name.count("."), sum(parameter.numel() for parameter in module.parameters())

    for decoder in (model.get_decoder(), model.base_model, model):
        lists = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        if lists:
            _, blocks = max(lists, key=rank)
            return next(name for name, other in model.named_modules() if other is blocks), blocks
    raise InvalidInput(f"{type(model).__name__} has no list of decoder blocks: this project prunes decoder-only models")


@contextmanager
def replaced(blocks: nn.ModuleList, forwards: list[Callable]) -> Iterator[None]:
    """Inside the context, `forwards` take the place of the blocks' forwards."""
    # They are set on the instances, so that a model that looks up attributes of its blocks still finds them.
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            del block.forward


def calls(model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor, chain: Chain) -> dict[int, Call]:
    """{block: what it is called with} in a forward pass of token ids (B, T) whose blocks do nothing.

    Caches become None: they would collect the keys of all samples.
    """
    noted: dict[int, Call] = {}

    def note(i: int, hidden: torch.Tensor, arguments: dict):
        noted[i] = hidden, {name: None if isinstance(value, Cache) else value for name, value in arguments.items()}
        return chain.output(noted[min(noted)][0])  # the first input again: the model only hands it on

    _forward(model, blocks, tokens, note)
    return noted


def learn(model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor) -> Chain:
    """Find out from a few tokens (1, T) how a model's forward runs its blocks.

    How many values its blocks return is found by trying.

    Raises:
        InvalidInput: it runs no block, runs one twice or out of order, or changes hidden states between two of them.
    """
    errors: list[Exception] = []
    for returned in range(MOST_RETURNED + 1):
        try:
            return _follow(model, blocks, tokens, Chain(returned))
        except Exception as error:  # from the model's code, to which the blocks have returned something unexpected
            if is_out_of_memory(error) or is_device_fault(error):
                raise
            errors.append(error)
    raise next((error for error in errors if isinstance(error, InvalidInput)), errors[0])


def _follow(model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor, chain: Chain) -> Chain:
    """Complete a chain from one forward pass, if what each block returns reaches the next block unchanged."""
    last: list[torch.Tensor] = []
    marks: list[tuple[torch.Tensor, tuple[int, int]]] = []  # (returned besides a hidden state, (block, position))

    def note(i: int, hidden: torch.Tensor, arguments: dict):
        if chain.run:
            if i <= chain.run[-1]:
                raise InvalidInput(f"block {i} is run after block {chain.run[-1]}")
            if not isinstance(hidden, torch.Tensor) or hidden.data_ptr() != last[0].data_ptr() or hidden.shape != last[0].shape:
                raise InvalidInput(f"between block {chain.run[-1]} and block {i} the model changes what it hands on")
        for name, value in arguments.items():
            for mark, place in marks:
                if value is mark:
                    chain.takes.setdefault(i, {})[name] = place
        chain.run.append(i)
        last[:] = [torch.zeros_like(hidden, memory_format=torch.contiguous_format)]
        rest = [hidden.new_zeros(1) for _ in range(chain.returned - 1)]
        marks.extend((mark, (i, position)) for position, mark in enumerate(rest, 1))
        return chain.output(last[0], rest)

    # To the end of the forward, because what a model takes from its last block shows only after it.
    output = _forward(model, blocks, tokens, note, to_the_end=True)
    if not chain.run:
        raise InvalidInput("the forward runs none of them")
    if output.logits.ndim != 3:
        raise InvalidInput(f"logits of shape {tuple(output.logits.shape)} are computed from what its blocks return")
    return chain


def _forward(model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor, note: Callable, to_the_end: bool = False):
    """Run a model whose blocks do nothing but return `note(number, hidden, other arguments by name)`.

    Stops at the last block and returns None. If it goes on `to_the_end`, it returns what the model returns.
    """

    def noting(i: int, block: nn.Module):
        names = [parameter.name for parameter in signature(type(block).forward).parameters.values()][1:]  # without self

        def forward(*args, **kwargs):
            bound = dict(zip(names, args, strict=False)) | kwargs
            output = note(i, bound.pop(names[0]), bound)
            if i + 1 == len(blocks) and not to_the_end:
                raise _Recorded
            return output

        return forward

    with replaced(blocks, [noting(i, block) for i, block in enumerate(blocks)]):
        try:
            return model(input_ids=tokens, use_cache=False)
        except _Recorded:
            return None
