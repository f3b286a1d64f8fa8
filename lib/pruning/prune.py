"""The one loop over blocks: a dense model and calibration windows in, a pruned model out, block after block.

observe       windows through the dense block: ||X||, or the Hessian of the inputs      statistics.py
score         |W| ||X|| + alpha |W| ||G||                                               scores.py
mask          the lowest of every row, or N of every M                                  masks.py
zero          W[mask] = 0, as published; or what stays is updated as well               updates/
reconstruct   what stays is trained towards the dense block's output, if asked for      updates/reconstruction.py
advance       windows through the pruned block: the next one's inputs
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from tqdm import tqdm

from lib import parallel
from lib.models.decoder import Decoder
from lib.pruning import scores
from lib.pruning.masks import Sparsity, lowest_of, mask_of
from lib.pruning.methods import Settings
from lib.pruning.outcome import Findings, PrunedBlock, unreached
from lib.pruning.statistics import Inputs
from lib.pruning.streams import Streams
from lib.pruning.updates import sparsegpt
from lib.pruning.updates.recipe import solve
from lib.pruning.updates.reconstruction import reconstruct


@torch.no_grad()
def prune(
    decoder: Decoder,
    windows: torch.Tensor | None,
    settings: Settings,
    *,
    gradients: Callable[[int], dict[str, torch.Tensor]] | None = None,
    held_out: torch.Tensor | None = None,
    hidden_states: int | None = None,
) -> Iterator[PrunedBlock]:
    """Prune a model block by block, first to last; yields each while it is resident and its weights are final.

    Block i sees activations that already passed through the pruned blocks 0..i-1. All its linears are scored from the dense
    block's activations, pruned together, and the block is run again to feed the next.

    Args:
        windows: (n, T) token ids, of which several processes take a share each; None if `settings.needs_windows` is not so.
        gradients: block index -> {linear: ||G|| (out, in) of the dense model}, for a method that uses them.
        held_out: (m, T) more windows, which nothing is fitted to: errors of updated linears are measured on them too.
        hidden_states: keep more than so many samples' hidden states in a file, not in memory.

    Raises:
        NotFinite: scores, or updated weights, of a linear.
    """
    score_of, group, recipe = settings.score, settings.group, settings.recipe
    streams = Streams.enter(decoder, windows, held_out, settings, hidden_states)
    for i in tqdm(range(len(decoder)), f"pruning ({settings.method})", unit="block", disable=parallel.rank() > 0 or None):
        targets = settings.targets.get(i, {})
        with decoder.resident(i) as block:
            matrices = decoder.matrices(i)
            linears = {name: matrices[name] for name in targets}
            inputs, held_out_inputs = streams.observe(i, linears, settings)
            grad_norms = gradients(i) if settings.rule.gradients and linears else {}
            unreached_experts, stay_dense = unreached(
                decoder, i, linears, inputs, grad_norms, settings
            )  # which says so in the log
            findings = Findings(settings)
            for name, linear in linears.items():
                weight, target, grad_norm = linear.weight, targets[name], grad_norms.get(name)
                if name in stay_dense:
                    continue
                if name in unreached_experts:  # nothing is known of their inputs: by magnitude, row by row, whatever the method
                    weight.masked_fill_(mask_of(scores.magnitude(weight), target), 0)
                elif settings.masks_only:
                    x_norm = inputs[name].x_norm if name in inputs else None
                    score = score_of(weight, x_norm, grad_norm)  # of gblm: |W| ||X|| + alpha |W| ||G||
                    mask = mask_of(score, target, group)
                    weight.masked_fill_(mask, 0)  # W[mask] = 0
                    findings.watch(name, score)
                else:  # the same score and mask, asked for once or in stages: `choose` below
                    updated = update(weight, inputs[name], grad_norm, target, settings, partial(findings.watch, name))
                    findings.measure(name, weight, updated, inputs[name], held_out_inputs.get(name))
                    weight.copy_(updated)
                findings.watch(name, weight)
            # Nothing of this block's stays beside what training needs, nor the next block's.
            linear = weight = grad_norm = x_norm = score = mask = updated = inputs = held_out_inputs = None
            if recipe.epochs and linears:
                trained = {"count": streams.count, "epochs": recipe.epochs, "rate": recipe.rate}
                findings.errors[""] = reconstruct(decoder, i, linears, streams.pruned, streams.dense, **trained)
            yield findings.of_block(decoder, i, block, linears)  # whoever asked writes it now
            streams.advance(i)


def update(
    weight: torch.Tensor,
    inputs: Inputs,
    grad_norm: torch.Tensor | None,
    target: Sparsity,
    settings: Settings,
    watch: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """A weight (out, in) without what is removed, and the rest of it updated: by SparseGPT as published, which has a mask of its
    own, or as the recipe says. `watch` is given every score on the way."""
    if settings.recipe.update == "none":  # as published
        return sparsegpt.solve(weight, inputs.hessian.clone(), target)

    def choose(current: torch.Tensor, share: float) -> torch.Tensor:
        """The mask for the current weights; of what it removes, the `share` of lowest score."""
        score = settings.score(current, inputs.x_norm, grad_norm)
        watch(score)
        if settings.rule.solver:  # only its mask: what is left is updated as the recipe says
            mask = sparsegpt.solve(current, inputs.hessian.clone(), target) == 0
        else:
            mask = mask_of(score, target, settings.group)
        return mask if share == 1 else lowest_of(mask, score, share)

    return solve(weight, inputs, choose, settings.recipe)
