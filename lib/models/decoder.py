"""A causal language model of Hugging Face as head - blocks - tail; the only module that knows how `transformers`' models run.

    head: token embeddings, attention masks, rotary tables     blocks: the decoder layers     tail: final norm, LM head, loss

Head and tail are the model's own forward with the blocks' forward replaced, so sliding windows, embedding scales, logit
soft-capping and tied heads are the model's own and no family is a special case.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

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

# Logits of a whole window would be the largest tensor of a run. On a CPU 64 positions of a usual vocabulary are little enough
# for the allocator to use the same memory again; what is larger it fetches from the system, page by page, every time.
TAIL_POSITIONS = {"cpu": 64, "gpu": 512}
HANDED = "returned by earlier blocks"  # among a block's arguments: what of that it takes, by (block, position)
PROBE_TOKENS = 11  # of the text that tells how a model runs


@dataclass
class State:
    """One sample on its way through the blocks: `hidden` (B, T, H) and the keyword arguments of every block."""

    hidden: torch.Tensor
    kwargs: list[dict]
    carried: Carried = field(default_factory=dict)  # of the arguments, the mappings that blocks fill for later ones
    mapped: bool = False  # `hidden` is a slot of a file, to be written in place


class Decoder:
    """A causal LM as head - blocks - tail, in memory or (`source` given) with its blocks read from disk as needed.

    Args:
        model: any `AutoModelForCausalLM`, most of whose blocks' weights are matrices (weights.py); its parameters are frozen.
        device: where the blocks compute. Whatever of the model is in memory must already be there.
        source: {tensor name: tensor}; the blocks' own tensors are then on the meta device.

    Raises:
        ValueError: no list of decoder blocks, quantised weights, less than half of the blocks' weights can be pruned, or
            the blocks cannot be run one by one.
    """

    def __init__(self, model: nn.Module, device: torch.device, source: Mapping[str, torch.Tensor] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.device = device
        self.source = source
        path, self.blocks = find_blocks(model)
        self.prefixes = [f"{path}.{i}." for i in range(len(self.blocks))]
        self._kwargs: list[dict] = []  # of the sample before, of which the next shares what is equal
        self.chain: Chain | None = None  # learnt from the first tokens, with what follows
        self._time = 1  # the dimension of hidden states that is T
        self.hidden_bytes = 0.0  # of a token in a hidden state
        self.own_bytes = 0.0  # of a token in the blocks' other arguments, as far as samples do not share them
        self.several = self._used_several_times()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # one product per expert: `weights.products` sees each
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False  # the loss is the cross-entropy, without what balances experts in training
        self.share = checks.require_prunable(self)
        if not any(parameter.is_meta for parameter in model.parameters()):
            checks.require_runs_alone(self)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def skipped(self) -> frozenset[int]:
        """The blocks that the model's forward leaves out for text, as it does cross-attention without an image.

        They are identities here, without matrices: nothing is known of their inputs, so they stay dense. An outline, which
        cannot run, has none.
        """
        return frozenset(range(len(self))) - frozenset(self.chain.run) if self.chain else frozenset()

    def linears(self, i: int) -> dict[str, Matrix]:
        """{path inside the block: matrix} of all that is pruned in block `i` unless flags say otherwise."""
        return {name: matrix for name, matrix in self.matrices(i).items() if not matrix.router}

    def routers(self, i: int) -> dict[str, Matrix]:
        """Those that send tokens to experts: dense unless a flag names them."""
        return {name: matrix for name, matrix in self.matrices(i).items() if matrix.router}

    def shapes(self, i: int) -> dict[str, torch.Size]:
        """{matrix: (out, in)} of block `i`, routers included."""
        return {name: matrix.shape for name, matrix in self.matrices(i).items()}

    @contextmanager
    def resident(self, i: int) -> Iterator[nn.Module]:
        """Inside the context, block `i`'s weights are on the compute device. Changes to streamed weights do not outlive it."""
        block = self.blocks[i]
        if self.source is None or i in self.skipped:
            yield block
            return
        names = list(block.state_dict())
        try:
            for name in names:
                # From a mapped file, whose pages the driver has taken when the call returns: nobody need wait for the copy.
                key = self.prefixes[i] + name
                value = self.source[self.model.all_tied_weights_keys.get(key, key)].to(
                    self.device, self.model.dtype, non_blocking=True, copy=True
                )
                set_module_tensor_to_device(block, name, self.device, value=value, clear_cache=False)
            yield block
        finally:
            for name in names:
                set_module_tensor_to_device(block, name, "meta")
            trim_heap()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Inside the context, the model's own forward works; of a streamed one, each block is read when it comes to it."""

        def read_first(i: int, forward):
            def run(*args, **kwargs):
                with self.resident(i):
                    return forward(*args, **kwargs)

            return run

        if self.source is None:
            yield self.model
        else:
            with replaced(self.blocks, [read_first(i, block.forward) for i, block in enumerate(self.blocks)]):
                yield self.model

    @torch.no_grad()
    def enter(self, tokens: torch.Tensor) -> State:
        """The head: token ids (B, T) to the hidden state (B, T, H) that enters block 0, and every block's arguments."""
        if self.chain is None:
            self._learn()
        found = calls(self.model, self.blocks, tokens.to(self.device), self.chain)
        kwargs, carried = split([found[i][1] if i in found else {} for i in range(len(self))])
        kwargs = self._kwargs = block_arguments.shared(kwargs, self._kwargs)
        if self.chain.takes:
            carried[HANDED] = {}
        if carried:
            kwargs = [
                own | {name: carried[name] for name in carried if name == HANDED or name in found.get(i, (None, ()))[1]}
                for i, own in enumerate(kwargs)
            ]
        return State(found[min(found)][0], kwargs, carried)

    def _learn(self) -> None:
        """How the model runs its blocks, and how much a sample is on its way through them."""
        tokens = self.probe()
        self.chain = learn(self.model, self.blocks, tokens)
        one, other = self.enter(tokens), self.enter(tokens.flip(1))
        shape = tuple(one.hidden.shape)
        if shape.count(PROBE_TOKENS) != 1:
            raise InvalidInput(f"the first block is given hidden states of {shape} for {PROBE_TOKENS} tokens")
        self._time = shape.index(PROBE_TOKENS)
        self.hidden_bytes = one.hidden.nbytes / PROBE_TOKENS
        self.own_bytes = sum(tensor.nbytes for tensor in block_arguments.own(other.kwargs, one.kwargs)) / PROBE_TOKENS

    def probe(self) -> torch.Tensor:
        """A few tokens, (1, PROBE_TOKENS)."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return (torch.arange(3, 3 + PROBE_TOKENS, device=self.device) % vocabulary)[None]

    def enter_all(self, windows: torch.Tensor, in_memory: int | None = None) -> list[State]:
        """The head for windows (n, T), each a sample. If they are more than `in_memory`, their hidden states, and what else is
        a sample's own, are kept in mapped temporary files."""
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
                    kept = block_arguments.in_file(self._kwargs, before)
                    state.kwargs = [given | own for given, own in zip(state.kwargs, kept, strict=True)]
            states.append(state)
        return states

    def run(
        self, i: int, hidden: torch.Tensor, kwargs: dict, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Block `i`, which must be resident: (B, T, H) to (B, T, H); `weights`, by their names inside it, instead of its own."""
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
        handed |= {(i, position): output[position] for _, position in self.chain.given(i) if output[position] is not None}
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
        """The model's own mean cross-entropy of `tokens` (B, T) given the last block's output `hidden` (B, T, H).

        Returns (loss, None), or with a `loss_scale` (loss, d(loss * loss_scale) / d hidden). The logits of only
        `positions` (default: TAIL_POSITIONS) exist at a time: norm, head and loss treat every position alone.
        """
        targets = tokens.shape[1] - 1
        tokens = tokens.to(self.device)
        total = torch.zeros((), device=self.device)
        gradient = None if loss_scale is None else torch.zeros_like(hidden)
        positions = positions or TAIL_POSITIONS["cpu" if self.device.type == "cpu" else "gpu"]
        for start in range(0, targets, positions):
            stop = min(start + positions, targets)
            span = slice(start, stop + 1)  # the last position of a span is only a target, and the first of the next
            part = hidden.narrow(self._time, start, stop + 1 - start).detach()
            output = self.chain.output(part)
            with (
                torch.set_grad_enabled(gradient is not None),
                replaced(self.blocks, [lambda *args, output=output, **kwargs: output] * len(self)),
            ):
                part.requires_grad_(gradient is not None)
                loss = self.model(input_ids=tokens[:, span], labels=tokens[:, span], use_cache=False).loss
                loss = loss * ((stop - start) / targets)
                if gradient is not None:
                    gradient.narrow(self._time, start, stop + 1 - start).add_(torch.autograd.grad(loss * loss_scale, part)[0])
            total += loss.detach()
        return total, gradient

    def matrices(self, i: int) -> dict[str, Matrix]:
        """What can be pruned in block `i`: not what other blocks use as well, they would need other masks."""
        matrices = matrices_of(self.blocks[i]) if i not in self.skipped else {}
        return {name: m for name, m in matrices.items() if self.prefixes[i] + m.tensor_name not in self.several}

    def _used_several_times(self) -> set[str]:
        """Names in the model of parameters that several blocks share, or a block uses under several names."""
        names: dict[int, list[str]] = {}
        for prefix, block in zip(self.prefixes, self.blocks, strict=True):
            for name, parameter in block.named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), []).append(prefix + name)
        tied = {name for pair in getattr(self.model, "all_tied_weights_keys", {}).items() for name in pair}
        own = {name for group in names.values() for name in group}
        return {name for group in names.values() if len(group) > 1 for name in group} | (tied & own)
