"""A causal language model of Hugging Face as head - blocks - tail; the only module that knows how `transformers`' models run.

    head: token embeddings, attention masks, rotary tables     blocks: the decoder layers     tail: final norm, LM head, loss

Head and tail are the model's forward with other forwards in place of its blocks'. So sliding windows, embedding scales, logit
soft-capping and tied heads are what the model makes of them, and no family is a special case.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.func import functional_call

from lib.errors import InvalidInput
from lib.models import block_arguments, checks
from lib.models.block_arguments import Carried, split
from lib.models.block_order import Chain, calls, find_blocks, learn, replaced
from lib.models.host import mapped, trim_heap
from lib.models.matrices import Matrix, matrices_of

# Logits of a whole window would be the largest tensor of a run. On a CPU, those of 64 positions are small enough for the
# allocator to reuse their memory. Larger ones would be fetched from the system each time, page by page.
TAIL_POSITIONS = {"cpu": 64, "gpu": 512}
HANDED = "returned by earlier blocks"  # key in a block's arguments of {(block, position): what blocks returned besides}
PROBE_TOKENS = 11  # tokens of the text that tells how a model runs


@dataclass
class State:
    """One sample on its way through the blocks: `hidden` (B, T, H) and the keyword arguments of every block."""

    hidden: torch.Tensor
    kwargs: list[dict]
    carried: Carried = field(default_factory=dict)  # those of the arguments that blocks fill for later blocks
    mapped: bool = False  # `hidden` is a part of a file and must be written in place


class Decoder:
    """A causal LM as head - blocks - tail, in memory or, if it has a `source`, with its blocks read from disk as needed.

    Args:
        model: any `AutoModelForCausalLM` whose blocks consist mostly of matrices (matrices.py). Its parameters are frozen.
        device: where the blocks compute. All parts of the model that are in memory must already be there.
        source: {tensor name: tensor} to read blocks from; the tensors in the model's blocks are then on the meta device.

    Raises:
        InvalidInput: the model has no list of decoder blocks, or cannot be pruned block by block (checks.py).
    """

    def __init__(self, model: nn.Module, device: torch.device, source: Mapping[str, torch.Tensor] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.device = device
        self.source = source
        path, self.blocks = find_blocks(model)
        self.prefixes = [f"{path}.{i}." for i in range(len(self.blocks))]
        self._kwargs: list[dict] = []  # those of the sample before: the next sample shares what is equal
        self.chain: Chain | None = None  # `_learn` sets this and the next three when the first tokens come
        self._time = 1  # the dimension of hidden states that is T
        self.hidden_bytes = 0.0  # bytes per token of a hidden state
        self.own_bytes = 0.0  # bytes per token of the blocks' other arguments, without what samples share
        self.several = self._used_several_times()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # a product for each expert, which `matrices.products` observes
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False  # the loss is the cross-entropy, without a term that balances experts
        self.share = checks.require_prunable(self)
        if not any(parameter.is_meta for parameter in model.parameters()):
            checks.require_runs_alone(self)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def skipped(self) -> frozenset[int]:
        """The blocks that the model's forward leaves out for text, such as cross-attention to an image.

        They stay dense, as identities without matrices: nothing is known of their inputs. An outline, never run, has none.
        """
        return frozenset(range(len(self))) - frozenset(self.chain.run) if self.chain else frozenset()

    def linears(self, i: int) -> dict[str, Matrix]:
        """{name inside the block: matrix} of all that is pruned in block `i` unless flags say otherwise."""
        return {name: matrix for name, matrix in self.matrices(i).items() if not matrix.router}

    def routers(self, i: int) -> dict[str, Matrix]:
        """The matrices that send tokens to experts. They stay dense unless a flag names them."""
        return {name: matrix for name, matrix in self.matrices(i).items() if matrix.router}

    def shapes(self, i: int) -> dict[str, torch.Size]:
        """{matrix: (out, in)} of block `i`, routers included."""
        return {name: matrix.shape for name, matrix in self.matrices(i).items()}

    @contextmanager
    def resident(self, i: int) -> Iterator[nn.Module]:
        """Inside the context, block `i`'s weights are on the compute device. Changes to streamed weights are lost after it."""
        block = self.blocks[i]
        if self.source is None or i in self.skipped:
            yield block
            return
        names = list(block.state_dict())
        try:
            for name in names:
                key = self.prefixes[i] + name
                stored_as = self.model.all_tied_weights_keys.get(key, key)
                # Not waiting is safe: the driver has read the pages of the mapped file when the call returns.
                value = self.source[stored_as].to(self.device, self.model.dtype, non_blocking=True, copy=True)
                set_module_tensor_to_device(block, name, self.device, value=value, clear_cache=False)
            yield block
        finally:
            for name in names:
                set_module_tensor_to_device(block, name, "meta")
            trim_heap()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Inside the context, the whole model's forward works. Blocks of a streamed model are read when they are called."""

        def run(i: int, forward, /, *args, **kwargs):
            with self.resident(i):
                return forward(*args, **kwargs)

        if self.source is None:
            yield self.model
        else:
            with replaced(self.blocks, [partial(run, i, block.forward) for i, block in enumerate(self.blocks)]):
                yield self.model

    @torch.no_grad()
    def enter(self, tokens: torch.Tensor) -> State:
        """The head: token ids (B, T) to the hidden state (B, T, H) that enters block 0, and every block's arguments."""
        if self.chain is None:
            self._learn()
        noted = calls(self.model, self.blocks, tokens.to(self.device), self.chain)
        arguments = [noted[i][1] if i in noted else {} for i in range(len(self))]
        kwargs, carried = split(arguments)
        kwargs = self._kwargs = block_arguments.shared(kwargs, self._kwargs)
        if self.chain.takes:
            carried[HANDED] = {}
        if carried:
            kwargs = [
                rest | {name: mapping for name, mapping in carried.items() if name == HANDED or name in arguments[i]}
                for i, rest in enumerate(kwargs)
            ]
        return State(noted[min(noted)][0], kwargs, carried)

    def _learn(self) -> None:
        """Find out how the model runs its blocks, and how much memory a sample takes on its way through them."""
        tokens = self.probe()
        self.chain = learn(self.model, self.blocks, tokens)
        one, other = self.enter(tokens), self.enter(tokens.flip(1))
        shape = tuple(one.hidden.shape)
        if shape.count(PROBE_TOKENS) != 1:
            raise InvalidInput(f"the first block is given hidden states of {shape} for {PROBE_TOKENS} tokens")
        self._time = shape.index(PROBE_TOKENS)
        self.hidden_bytes = one.hidden.nbytes / PROBE_TOKENS
        self.own_bytes = sum(tensor.nbytes for tensor in block_arguments.unshared(other.kwargs, one.kwargs)) / PROBE_TOKENS

    def probe(self) -> torch.Tensor:
        """A few tokens, (1, PROBE_TOKENS)."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return (torch.arange(3, 3 + PROBE_TOKENS, device=self.device) % vocabulary)[None]

    def enter_all(self, windows: torch.Tensor, in_memory: int | None = None) -> list[State]:
        """The head for windows (n, T), each a sample. If more than `in_memory`, what they do not share is in mapped files."""
        states: list[State] = []
        slots, windows = None, windows.to(self.device)
        for k, window in enumerate(windows):
            before = self._kwargs
            state = self.enter(window[None])
            if in_memory is not None and len(windows) > in_memory:
                if slots is None:
                    slots = mapped((len(windows), *state.hidden.shape), state.hidden.dtype)
                state.hidden, state.mapped = slots[k].copy_(state.hidden), True
                if self.own_bytes:
                    in_file = block_arguments.in_file(self._kwargs, before)
                    state.kwargs = [arguments | stored for arguments, stored in zip(state.kwargs, in_file, strict=True)]
            states.append(state)
        return states

    def run(
        self, i: int, hidden: torch.Tensor, kwargs: dict, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Block `i`, which must be resident: (B, T, H) to (B, T, H). `weights`, by name in the block, replace its weights."""
        if i not in self.chain.run:
            return hidden
        handed = kwargs.get(HANDED, {})
        taken = {name: handed[place] for name, place in self.chain.takes.get(i, {}).items() if place in handed}
        block, kwargs = self.blocks[i], {name: value for name, value in kwargs.items() if name != HANDED} | taken
        if self.own_bytes:
            kwargs = block_arguments.on(self.device, kwargs)
        output = functional_call(block, weights, (hidden,), kwargs) if weights else block(hidden, **kwargs)
        if not isinstance(output, tuple | list):
            return output
        handed |= {(i, position): output[position] for _, position in self.chain.handed_on(i) if output[position] is not None}
        return output[0]

    @torch.no_grad()
    def advance(self, i: int, states: list[State]) -> None:
        """Send every state through block `i`, which must be resident, in place."""
        for state in states:
            output = self.run(i, state.hidden.to(self.device), state.kwargs[i])
            state.hidden = state.hidden.copy_(output) if state.mapped else output

    def tail(
        self, hidden: torch.Tensor, tokens: torch.Tensor, loss_scale: float | None = None, positions: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tail: the last block's output `hidden` (B, T, H) to the model's mean cross-entropy on `tokens` (B, T).

        Returns (loss, None), or with a `loss_scale` (loss, d(loss * loss_scale) / d hidden). Logits of only `positions`
        positions (default: TAIL_POSITIONS) exist at a time, since norm, head and loss treat every position alone.
        """
        tokens, targets = tokens.to(self.device), tokens.shape[1] - 1
        total = torch.zeros((), device=self.device)
        gradient = None if loss_scale is None else torch.zeros_like(hidden)
        positions = positions or TAIL_POSITIONS["cpu" if self.device.type == "cpu" else "gpu"]
        for start in range(0, targets, positions):
            stop = min(start + positions, targets)
            span = slice(start, stop + 1)  # its last position is only a target, and the first one of the next span
            part = hidden.narrow(self._time, start, stop + 1 - start).detach()
            output = self.chain.output(part)
            forwards = [lambda *args, output=output, **kwargs: output] * len(self)
            with torch.set_grad_enabled(gradient is not None), replaced(self.blocks, forwards):
                part.requires_grad_(gradient is not None)
                loss = self.model(input_ids=tokens[:, span], labels=tokens[:, span], use_cache=False).loss
                loss = loss * ((stop - start) / targets)
                if gradient is not None:
                    gradient.narrow(self._time, start, stop + 1 - start).add_(torch.autograd.grad(loss * loss_scale, part)[0])
            total += loss.detach()
        return total, gradient

    def matrices(self, i: int) -> dict[str, Matrix]:
        """All that can be pruned in block `i`. Not matrices that other blocks use too, which would need other masks."""
        matrices = matrices_of(self.blocks[i]) if i not in self.skipped else {}
        return {name: m for name, m in matrices.items() if self.prefixes[i] + m.tensor_name not in self.several}

    def _used_several_times(self) -> set[str]:
        """Names in the model of parameters that several blocks share, or that a block uses under several names."""
        names: dict[int, list[str]] = {}
        for prefix, block in zip(self.prefixes, self.blocks, strict=True):
            for name, parameter in block.named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), []).append(prefix + name)
        tied = {name for pair in getattr(self.model, "all_tied_weights_keys", {}).items() for name in pair}
        in_blocks = {name for group in names.values() for name in group}
        return {name for group in names.values() if len(group) > 1 for name in group} | (tied & in_blocks)
