"""Samples on their way through the model, in the versions of it that pruning needs."""

from dataclasses import dataclass

import torch

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.matrices import Matrix
from lib.pruning.methods import Settings
from lib.pruning.statistics import ExactHessian, Inputs, collect


@dataclass
class Streams:
    """Hidden states before the next block: of the calibration samples in the pruned model and, where something follows that, in the
    dense one; and of windows held out, in the pruned one. `count`, `held_out_count`: of all processes."""

    decoder: Decoder
    pruned: list[State]
    dense: list[State]
    held_out: list[State]
    count: int
    held_out_count: int

    @classmethod
    def enter(
        cls,
        decoder: Decoder,
        windows: torch.Tensor | None,
        held_out: torch.Tensor | None,
        settings: Settings,
        hidden_states: int | None,
    ) -> "Streams":
        """The states of this process' share of the windows; all streams together keep `hidden_states` in memory, or all."""
        texts = [
            windows if settings.needs_windows else None,
            windows if settings.recipe.follows_dense else None,
            held_out if settings.recipe.update != "none" else None,
        ]
        total = sum(len(text) for text in texts if text is not None)
        states: list[list[State]] = []
        for text in texts:
            if text is None:
                states.append([])
            else:
                in_memory = None if hidden_states is None else hidden_states * len(text) // total
                states.append(decoder.enter_all(parallel.share(text), in_memory))
        counts = [0 if text is None else len(text) for text in texts]
        return cls(decoder, *states, counts[0], counts[2])

    def observe(self, i: int, linears: dict[str, Matrix], settings: Settings) -> tuple[dict[str, Inputs], dict[str, Inputs]]:
        """What the samples, and those held out, tell about the inputs of block `i`'s linears. The dense stream leaves the block,
        which is as yet dense."""
        drifting = bool(settings.recipe.asymmetric and linears)
        if not drifting:
            self.decoder.advance(i, self.dense)
        inputs: dict[str, Inputs] = {}
        held_out: dict[str, Inputs] = {}
        if settings.statistic and linears:
            dense = self.dense if drifting else None
            inputs = collect(self.decoder, i, linears, self.pruned, settings.statistic, self.count, dense)
        if self.held_out_count and linears:
            held_out = collect(self.decoder, i, linears, self.held_out, ExactHessian, self.held_out_count, text="held-out")
        return inputs, held_out

    def advance(self, i: int) -> None:
        """Through the pruned block `i`, to the inputs of the next one."""
        if i + 1 < len(self.decoder):
            self.decoder.advance(i, self.pruned)
            self.decoder.advance(i, self.held_out)
