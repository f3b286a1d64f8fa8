"""What becomes of the weights that stay: nothing, SparseGPT's update, or exact least squares, in stages; and the recipes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.errors import InvalidInput
from lib.pruning.statistics import Inputs
from lib.pruning.updates import admm, asymmetric, least_squares, sparsegpt

UPDATES = ("none", "obs", "lsq")
POLISH_STEPS = 3  # of conjugate gradients behind the stages, whose weights are near the solution already


@dataclass(frozen=True)
class Recipe:
    """What follows the mask.

    `update`: "none", as published: survivors keep their bits; "obs" (sparsegpt.py) or "lsq" (least_squares.py).
    `stages`: how many times the mask is chosen, each time from weights updated since, until all that is to go is gone.
    `asymmetric`: the share of what pruning has changed in a linear's inputs that its weights make up for (asymmetric.py).
    `epochs` of reconstruction (reconstruction.py), its learning rate falling from `rate` times a matrix' scale to 0.
    """

    update: str = "none"
    stages: int = 1
    epochs: int = 0
    rate: float = 0.01
    asymmetric: float = 0.0

    def __post_init__(self):
        if self.update not in UPDATES:
            raise InvalidInput(f"update {self.update!r} is not one of {', '.join(UPDATES)}")
        if self.stages < 1:
            raise InvalidInput(f"{self.stages} stages: at least one is needed")
        if self.stages > 1 and self.update == "none":
            raise InvalidInput(f"{self.stages} stages need weights that change between them: add --update lsq or obs")
        if self.asymmetric and self.update == "none":
            raise InvalidInput(
                f"--asymmetric {self.asymmetric:g} is about the weights that an update aims at: add --update lsq or obs"
            )

    @property
    def changes_survivors(self) -> bool:
        """Whether weights that stay are other than before."""
        return self.update != "none" or self.epochs > 0

    @property
    def follows_dense(self) -> bool:
        """Whether the samples pass through the dense model beside the pruned one."""
        return self.asymmetric > 0 or self.epochs > 0


PUBLISHED = Recipe()  # survivors keep their bits, but for SparseGPT's
RECIPES = {
    "fast": Recipe("lsq", stages=4, asymmetric=0.25),
    "best": Recipe("lsq", stages=4, epochs=1),
    "max": Recipe("lsq", stages=8, epochs=6),
}  # docs/recipes.md


def shares(stages: int) -> list[float]:
    """The share of the final mask that is removed after each stage: `1 - (1 - k/K)^3` (arXiv 2401.02938)."""
    return [1 - (1 - k / stages) ** 3 for k in range(1, stages + 1)]


def solve(
    weight: torch.Tensor, inputs: Inputs, choose: Callable[[torch.Tensor, float], torch.Tensor], recipe: Recipe
) -> torch.Tensor:
    """Remove weights and update those that remain, stage by stage, by "obs" or "lsq".

    Args:
        weight: (out, in), any float dtype.
        inputs: their Hessian and, where the recipe is asymmetric, the drift.
        choose: (the weights as they are by then (out, in), share) -> the mask of that share of what is to go, (out, in).

    Returns:
        The new weight, (out, in), in the dtype of `weight`; infinite where it leaves that dtype's range.
    """
    hessian, goal = inputs.hessian, weight
    if inputs.drift is not None:
        goal = asymmetric.target(weight, hessian, inputs.drift, recipe.asymmetric)
    if recipe.update == "obs":
        current = goal.float()
        for share in shares(recipe.stages):
            current = sparsegpt.solve(current, hessian.clone(), choose(current, share))
    elif recipe.update != "lsq":
        raise ValueError(f"update {recipe.update!r} has no branch here")
    elif recipe.stages == 1:
        current = least_squares.solve(goal, choose(goal, 1), hessian.clone())
    else:
        mask, start = admm.solve(goal, hessian.clone(), choose, shares(recipe.stages), weight.dtype)
        current = least_squares.solve(goal, mask, hessian.clone(), start=start, steps=POLISH_STEPS)
    return current.to(weight.dtype)


def relative_errors(dense: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Of a linear's outputs on the samples of a Hessian, `||X (V - W)^T||^2 / ||X W^T||^2`: (2,), V masked alone and as it is.

    `dense` is W and `pruned` V, (out, in), of one dtype; the mask is where V is zero. They are to be read, not computed with:
    bfloat16 weights are multiplied as they are, which costs the fourth digit, and more of errors below 1e-4 where all inputs
    share a large mean.
    """
    dtype = dense.dtype if dense.dtype == torch.bfloat16 else hessian.dtype  # float16 could not hold H
    h, w, v = hessian.to(dtype), dense.to(dtype), pruned.to(dtype)
    power, before, after = ((d @ h).mul_(d).sum(dtype=hessian.dtype) for d in (w, w.masked_fill(v != 0, 0), w - v))
    return torch.stack([before, after]).clamp(min=0) / power
