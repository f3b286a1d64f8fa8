"""A causal language model of Hugging Face as head - blocks - tail; the only module that knows how `transformers`' models run.

    head: token embeddings, attention masks, rotary tables     blocks: the decoder layers     tail: final norm, LM head, loss

Head and tail are the model's own forward with the blocks' forward replaced, so sliding windows, embedding scales, logit
soft-capping and tied heads are the model's own and no family is a special case.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers.cache_utils import Cache

from lib.models.carried import Carried, split
from lib.models.host import mapped, trim_heap
from lib.models.weights import Matrix, matrices_of

# Logits of a whole window would be the largest tensor of a run. On a CPU 64 positions of a usual vocabulary are little enough
# for the allocator to use the same memory again; what is larger it fetches from the system, page by page, every time.
TAIL_POSITIONS = {"cpu": 64, "gpu": 512}
FINGERPRINT_VALUES = 16  # weights of each matrix that identify it
MINIMUM_SHARE = 0.5  # of the blocks' weights, less makes a model not worth pruning


@dataclass
class State:
    """One sample on its way through the blocks: `hidden` (B, T, H) and the keyword arguments of every block."""

    hidden: torch.Tensor
    kwargs: list[dict]
    carried: Carried = field(default_factory=dict)  # of the arguments, the mappings that blocks fill for later ones
    mapped: bool = False  # `hidden` is a slot of a file, to be written in place


class _Recorded(Exception):
    """Leaves the model's forward once the last block's arguments are known."""


class Decoder:
    """A causal LM as head - blocks - tail, in memory or (`source` given) with its blocks read from disk as needed.

    Args:
        model: any `AutoModelForCausalLM`, most of whose blocks' weights are matrices (weights.py); its parameters are frozen.
        device: where the blocks compute. Whatever of the model is in memory must already be there.
        source: {tensor name: tensor}; the blocks' own tensors are then on the meta device.

    Raises:
        ValueError: no list of decoder blocks, quantised weights, or less than half of the blocks' weights can be pruned.
    """

    def __init__(self, model: nn.Module, device: torch.device, source: Mapping[str, torch.Tensor] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.device = device
        self.source = source
        path, self.blocks = _find_blocks(model)
        self.prefixes = [f"{path}.{i}." for i in range(len(self.blocks))]
        self._kwargs: list[dict] = []  # of the sample before, shared by samples that have equal ones
        self._returns_tuple = False  # of a block; learnt when one runs
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # one product per expert: `weights.products` sees each
        self._require_prunable(path)

    def __len__(self) -> int:
        return len(self.blocks)

    def linears(self, i: int) -> dict[str, Matrix]:
        """{path inside the block: matrix} of all that is pruned in block `i` unless flags say otherwise."""
        return {name: matrix for name, matrix in matrices_of(self.blocks[i]).items() if not matrix.router}

    def routers(self, i: int) -> dict[str, Matrix]:
        """Those that send tokens to experts: dense unless a flag names them."""
        return {name: matrix for name, matrix in matrices_of(self.blocks[i]).items() if matrix.router}

    def shapes(self, i: int) -> dict[str, torch.Size]:
        """{matrix: (out, in)} of block `i`, routers included."""
        return {name: matrix.shape for name, matrix in matrices_of(self.blocks[i]).items()}

    def fingerprint(self, i: int) -> dict[str, torch.Tensor]:
        """A few weights of each matrix of block `i`, evenly spaced, fp32 on the CPU: {matrix: (FINGERPRINT_VALUES,)}."""
        matrices = matrices_of(self.blocks[i])
        where = [_evenly(matrix.shape) for matrix in matrices.values()]
        read: dict[str, torch.Tensor] = {}
        if self.source is None:
            where = torch.stack(where).to(self.device, non_blocking=True)  # (matrices, 2, values)
        values = []
        for matrix, (row, column) in zip(matrices.values(), where, strict=True):
            weight = matrix.stored.detach()
            if self.source is not None:
                if matrix.tensor_name not in read:  # a stack once for all its matrices
                    read = {matrix.tensor_name: self.source[self.prefixes[i] + matrix.tensor_name]}
                weight = read[matrix.tensor_name]
                weight = weight if matrix.index is None else weight[matrix.index]
            values.append(matrix.oriented(weight)[row, column].float())
        return dict(zip(matrices, torch.stack(values).cpu(), strict=True))

    def checksum(self) -> str:
        """SHA-256 of the fingerprint of all blocks: which weights these are."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            for values in self.fingerprint(i).values():
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def resident(self, i: int) -> Iterator[nn.Module]:
        """Inside the context, block `i`'s weights are on the compute device. Changes to streamed weights do not outlive it."""
        block = self.blocks[i]
        if self.source is None:
            yield block
            return
        names = list(block.state_dict())
        try:
            for name in names:
                # From a mapped file, whose pages the driver has taken when the call returns: nobody need wait for the copy.
                value = self.source[self.prefixes[i] + name].to(self.device, self.model.dtype, non_blocking=True, copy=True)
                set_module_tensor_to_device(block, name, self.device, value=value, clear_cache=False)
            yield block
        finally:
            for name in names:
                set_module_tensor_to_device(block, name, "meta")
            trim_heap()

    @torch.no_grad()
    def enter(self, tokens: torch.Tensor) -> State:
        """The head: token ids (B, T) to the hidden state (B, T, H) that enters block 0, and every block's arguments."""
        calls: list[tuple[torch.Tensor, dict]] = []

        def recorder(block: nn.Module):
            parameters = signature(type(block).forward).parameters.values()
            names = [parameter.name for parameter in parameters][1:]  # without self

            def record(*args, **kwargs):
                bound = dict(zip(names, args, strict=False)) | kwargs
                hidden = bound.pop(names[0])
                # A live cache would collect keys across samples.
                calls.append((hidden, {key: None if isinstance(value, Cache) else value for key, value in bound.items()}))
                if len(calls) == len(self.blocks):
                    raise _Recorded
                return calls[0][0]  # not `hidden`: a model that unpacks a tuple would hand on less of it from block to block

            return record

        with self._blocks_replaced([recorder(block) for block in self.blocks]):
            try:
                self.model(input_ids=tokens.to(self.device), use_cache=False)
            except _Recorded:
                pass
        kwargs, carried = split([call for _, call in calls])
        if not _equal(kwargs, self._kwargs):
            self._kwargs = kwargs
        kwargs = self._kwargs
        if carried:
            kwargs = [
                own | {name: carried[name] for name in call if name in carried}
                for own, (_, call) in zip(kwargs, calls, strict=True)
            ]
        return State(calls[0][0], kwargs, carried)

    def enter_all(self, windows: torch.Tensor, in_memory: int | None = None) -> list[State]:
        """The head for windows (n, T), each a sample. More than `in_memory` hidden states are kept in a mapped temporary file."""
        states: list[State] = []
        slots, windows = None, windows.to(self.device)
        for k, window in enumerate(windows):
            state = self.enter(window[None])
            if in_memory is not None and len(windows) > in_memory:
                if slots is None:
                    slots = mapped((len(windows), *state.hidden.shape), state.hidden.dtype)
                state.hidden, state.mapped = slots[k].copy_(state.hidden), True
            states.append(state)
        return states

    def run(self, i: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """Block `i`, which must be resident: (B, T, H) to (B, T, H)."""
        output = self.blocks[i](hidden, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        return output[0] if self._returns_tuple else output

    @torch.no_grad()
    def advance(self, i: int, states: list[State]) -> None:
        """Send every state through block `i`, which must be resident, in place."""
        for state in states:
            output = self.run(i, state.hidden.to(self.device), state.kwargs[i])
            state.hidden = state.hidden.copy_(output) if state.mapped else output

    def tail(self, hidden: torch.Tensor, tokens: torch.Tensor, loss_scale: float | None = None):
        """The model's own mean cross-entropy of `tokens` (B, T) given the last block's output `hidden` (B, T, H).

        Returns (loss, None), or with a `loss_scale` (loss, d(loss * loss_scale) / d hidden). The logits of only
        TAIL_POSITIONS positions exist at a time: norm, head and loss treat every position alone.
        """
        targets = tokens.shape[1] - 1
        tokens = tokens.to(self.device)
        total = torch.zeros((), device=self.device)
        gradient = None if loss_scale is None else torch.zeros_like(hidden)
        positions = TAIL_POSITIONS["cpu" if self.device.type == "cpu" else "gpu"]
        for start in range(0, targets, positions):
            stop = min(start + positions, targets)
            span = slice(start, stop + 1)  # the last position of a span is only a target, and the first of the next
            part = hidden[:, span].detach()
            output = (part,) if self._returns_tuple else part
            with (
                torch.set_grad_enabled(gradient is not None),
                self._blocks_replaced([lambda *args, output=output, **kwargs: output] * len(self.blocks)),
            ):
                part.requires_grad_(gradient is not None)
                loss = self.model(input_ids=tokens[:, span], labels=tokens[:, span], use_cache=False).loss
                loss = loss * ((stop - start) / targets)
                if gradient is not None:
                    gradient[:, span] += torch.autograd.grad(loss * loss_scale, part)[0]
            total += loss.detach()
        return total, gradient

    def _require_prunable(self, path: str) -> None:
        prunable = total = 0
        largest = ("", torch.empty(0))
        for i, block in enumerate(self.blocks):
            own = {id(getattr(matrix.module, matrix.parameter)) for matrix in self.linears(i).values()}
            for name, parameter in block.named_parameters():
                total += parameter.numel()
                if parameter.ndim > 1 and (not parameter.is_floating_point() or parameter.itemsize < 2):
                    raise ValueError(
                        f"{path}.{i}.{name} is stored in {parameter.dtype}: a quantised model cannot be pruned, load the one it "
                        "was made from"
                    )
                if id(parameter) in own:
                    prunable += parameter.numel()
                elif parameter.numel() > largest[1].numel():
                    largest = (f"{path}.{i}.{name}", parameter)
        if prunable < MINIMUM_SHARE * total:
            raise ValueError(
                f"only {prunable / total:.0%} of the weights in the blocks of {type(self.model).__name__} belong to matrix products "
                f"that can be pruned (the largest that does not: {largest[0]} {tuple(largest[1].shape)}): this is not worth pruning"
            )

    @contextmanager
    def _blocks_replaced(self, forwards: list) -> Iterator[None]:
        # On the instance, so that a model that asks a block for its attributes still finds them.
        try:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.forward = forward
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    if not count:
        raise ValueError(f"{type(model).__name__} has {count} decoder blocks (num_hidden_layers): there is nothing to prune")
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return next(name for name, other in model.named_modules() if other is module), module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder blocks: this project prunes decoder-only models")


def _evenly(shape: torch.Size) -> torch.Tensor:
    """Rows and columns of FINGERPRINT_VALUES weights of a matrix: (2, values)."""
    flat = torch.linspace(0, shape.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64).long()
    return torch.stack([flat // shape[1], flat % shape[1]])


def _equal(a, b) -> bool:
    """Whether two nested arguments hold the same values. A GPU is asked once, for all tensors in them."""
    pairs: dict[tuple[int, int], torch.Tensor] = {}
    return _alike(a, b, pairs) and (not pairs or torch.stack(list(pairs.values())).all().item())


def _alike(a, b, pairs: dict[tuple[int, int], torch.Tensor]) -> bool:
    """Whether two nested arguments may be equal: if all `pairs` of tensors in them are, which blocks share."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        if (id(a), id(b)) not in pairs:
            pairs[id(a), id(b)] = (a == b).all()
        return True
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_alike(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], pairs) for key in a)
    return a == b
