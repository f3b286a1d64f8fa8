"""What a model must be to be pruned here: its blocks mostly matrices, and to be run one by one."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from lib.errors import InvalidInput
from lib.models.files.checkpoint import Checkpoint, open_safetensors
from lib.models.files.conversion import ModelTensors
from lib.models.host import is_device_fault, is_out_of_memory
from lib.models.matrices import Matrix, kind_of

MINIMUM_SHARE = 0.5  # of the blocks' weights, less makes a model not worth pruning
# As headers of safetensors files and as torch call them.
COMPUTED_WITH = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
TOLERANCE = {torch.float32: 1e-3}  # of a few tokens' loss, relative; in 16 bits:
TOLERANCE_16 = 0.03


class Decoder(Protocol):
    """What these checks look at of a `decoder.Decoder`, which makes them while it is made."""

    model: nn.Module
    blocks: nn.ModuleList
    prefixes: list[str]
    source: Any

    def linears(self, i: int) -> dict[str, Matrix]: ...
    def probe(self) -> torch.Tensor: ...
    def enter(self, tokens: torch.Tensor) -> Any: ...
    def advance(self, i: int, states: list) -> None: ...
    def tail(self, hidden: torch.Tensor, tokens: torch.Tensor, *, positions: int) -> tuple[torch.Tensor, Any]: ...
    def __len__(self) -> int: ...


def require_prunable(decoder: Decoder) -> float:
    """The share of the blocks' weights that can be pruned; ValueError if that is less than half of them."""
    prunable = total = 0
    largest = ("", torch.empty(0))
    for i, name, parameter, can_be in _parameters(decoder):
        total += parameter.numel()
        if parameter.ndim > 1 and (not parameter.is_floating_point() or parameter.itemsize < 2):
            raise InvalidInput(
                f"{decoder.prefixes[i]}{name} is stored in {parameter.dtype}: a quantised model cannot be pruned, load the one it "
                "was made from"
            )
        if can_be:
            prunable += parameter.numel()
        elif parameter.numel() > largest[1].numel():
            largest = (f"{decoder.prefixes[i]}{name}", parameter)
    if prunable < MINIMUM_SHARE * total:
        raise InvalidInput(
            f"only {prunable / total:.0%} of the weights in the blocks of {type(decoder.model).__name__} belong to matrix products "
            f"that can be pruned (the largest that does not: {largest[0]} {tuple(largest[1].shape)}): this is not worth pruning"
        )
    return prunable / total


def require_dtypes(checkpoint: Checkpoint, outline: Callable[[], nn.Module]) -> None:
    """InvalidInput if a matrix is stored in a dtype of quantised weights, which mean nothing without their scales.

    transformers and torch convert them to the run's dtype all the same. `outline`: makes the model on the meta device, which
    says what a tensor is; it is called only if there are such dtypes.
    """
    others = {key: dtype for key, dtype in _dtypes(checkpoint).items() if dtype not in COMPUTED_WITH}
    if not others:
        return
    model = outline()
    state, tensors = model.state_dict(), ModelTensors(checkpoint, model)
    for name, group in tensors.group_of.items():
        for key in others.keys() & set(group.names) if state[name].is_floating_point() and state[name].ndim > 1 else ():
            raise InvalidInput(
                f"{key} in {checkpoint.folder} is stored in {others[key]}: a quantised model cannot be pruned, load the one it was "
                "made from"
            )


def _dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """{name in the files: dtype} of a checkpoint's tensors, from the files' headers."""
    dtypes: dict[str, str] = {}
    for shard, path in checkpoint.shards.items():
        if shard.endswith(".safetensors"):
            with open_safetensors(path) as file:
                dtypes |= {key: file.get_slice(key).get_dtype() for key, where in checkpoint.where.items() if where == shard}
        else:
            dtypes |= {key: str(checkpoint[key].dtype) for key, where in checkpoint.where.items() if where == shard}
    return dtypes


@torch.no_grad()
def require_runs_alone(decoder: Decoder) -> None:
    """Compare a few tokens' loss of the model's forward with that of its blocks run one by one; only head and tail are
    tried of a model whose blocks are not in memory.

    Raises:
        ValueError: they differ, or the model cannot be run on text alone.
    """
    try:
        tokens = decoder.probe()
        state = decoder.enter(tokens)
        for i in range(len(decoder) if decoder.source is None else 0):
            decoder.advance(i, [state])
        alone, _ = decoder.tail(state.hidden, tokens, positions=tokens.shape[1] // 2)
        if decoder.source is None:
            whole = decoder.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            tolerance = TOLERANCE.get(decoder.model.dtype, TOLERANCE_16)
            if abs(alone - whole) > tolerance * whole.abs().clamp(min=1):  # not if one of them is NaN: weights may be
                raise InvalidInput(f"their loss is {alone:.4f}, that of the whole model {whole:.4f}")
    except Exception as error:  # the code of two hundred models raises all there is
        if is_out_of_memory(error) or is_device_fault(error):
            raise
        said = f"{'' if isinstance(error, InvalidInput) else type(error).__name__ + ': '}{' '.join(str(error).split())[:200]}"
        raise InvalidInput(f"the blocks of {type(decoder.model).__name__} cannot be run one by one on text: {said}") from error


def dense_shares(decoder: Decoder) -> dict[str, float]:
    """{name, with "*" for numbers: share of the blocks' weights} of matrices and larger tensors that stay dense by their
    nature, the largest first."""
    shares: Counter[str] = Counter()
    total = 0
    for _, name, parameter, prunable in _parameters(decoder):
        total += parameter.numel()
        if parameter.ndim > 1 and not prunable:
            shares[kind_of(name)] += parameter.numel()
    return {name: count / total for name, count in shares.most_common()}


def _parameters(decoder: Decoder) -> Iterator[tuple[int, str, nn.Parameter, bool]]:
    """(block, name inside it, parameter, whether it can be pruned) of all of them, those of several blocks once."""
    shared: set[str] = set()
    for i, block in enumerate(decoder.blocks):
        prunable = {matrix.tensor_name for matrix in decoder.linears(i).values()}
        for name, parameter in block.named_parameters():
            if decoder.prefixes[i] + name in decoder.several:
                if kind_of(name) in shared:
                    continue
                shared.add(kind_of(name))
            yield i, name, parameter, name in prunable
