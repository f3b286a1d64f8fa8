"""The table of methods, and how one of them decides over the weights of a linear."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.models.weights import Matrix
from lib.pruning import scores, sparsegpt, update
from lib.pruning.activations import ActivationNorm
from lib.pruning.masks import Sparsity, lowest_of, n_of_m, per_row, variant, whole_matrix
from lib.pruning.update import PUBLISHED, Recipe

PAPER_ALPHA = 100.0  # arXiv 2311.04902, section 4; the published gradient files have it baked in as their scale
MAX_ALPHA = 1e30  # scores are fp32, and above 1e8 the activation term is lost in their rounding anyway


@dataclass(frozen=True)
class Method:
    """How a method decides: by a score and a mask, or (`statistic` is a Hessian, no score) by SparseGPT's solver."""

    score: Callable | None = None
    inverse: Callable | None = None  # the score under --gradient_inv
    statistic: type | None = None  # of the inputs of a linear; None: the method does not look at activations
    gradients: bool = False
    group: str = "row"  # what weights compete in when unstructured: "row" or "matrix"
    variant: bool = False  # accepts --use_variant

    def observes(self, recipe: Recipe = PUBLISHED) -> type | None:
        """The statistic that method and recipe need: a Hessian's diagonal holds the activation norm as well."""
        return self.statistic if recipe.update == "none" else sparsegpt.ExactHessian


METHODS = {
    "magnitude": Method(scores.magnitude, group="matrix"),
    "wanda": Method(scores.wanda, statistic=ActivationNorm, variant=True),
    "gradient": Method(scores.gradient, scores.gradient_inverse, gradients=True),
    "gblm": Method(scores.gblm, scores.gblm_inverse, statistic=ActivationNorm, gradients=True, variant=True),
    "sparsegpt": Method(statistic=sparsegpt.Hessian),
}


class Choice:
    """What decides over the weights of one linear: (its weights as they are now, a share) -> mask, True = remove.

    Args:
        statistic: activation norm (in,), Hessian (in, in), or Hessian and drift (2, in, in).
        grad_norm: (out, in), where the rule uses gradients.
    """

    def __init__(
        self,
        rule: Method,
        target: Sparsity,
        statistic: torch.Tensor | None,
        grad_norm: torch.Tensor | None,
        *,
        alpha: float = 1.0,
        inverse: bool = False,
        use_variant: bool = False,
    ):
        self.rule, self.target, self.use_variant = rule, target, use_variant
        self.hessian, self.drift = None, None
        if statistic is not None and statistic.ndim > 1:
            self.hessian, self.drift = statistic if statistic.ndim == 3 else (statistic, None)
        self.measure = (rule.inverse if inverse else rule.score) or scores.wanda
        self.alpha = {"alpha": alpha} if self.measure is scores.gblm else {}
        self.factors: dict[str, torch.Tensor] = {}
        if rule.statistic and statistic is None:  # an expert that no token reached
            self.factors["x_norm"] = torch.zeros(())
        elif rule.statistic:
            self.factors["x_norm"] = statistic if self.hessian is None else (self.hessian.diagonal() / 2).sqrt()
        if rule.gradients:
            self.factors["grad_norm"] = grad_norm
        self.sound = True  # whether all scores so far were finite; a tensor, that nobody need wait for

    def __call__(self, weight: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """The mask that method and target ask for, or of what it removes the `share` of lowest score."""
        factors = {name: value.to(weight.device, non_blocking=True) for name, value in self.factors.items()}
        score = self.measure(weight, **factors, **self.alpha)
        self.sound = score.amax().isfinite() & self.sound  # scores are not negative, and NaN is larger than all
        if self.rule.score:
            mask = mask_of(score, self.target, self.rule.group, self.use_variant)
        else:
            mask = sparsegpt.solve(weight, self.hessian.clone(), self.target) == 0
        return mask if share == 1 else lowest_of(mask, score, share)

    def pruned(self, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        """The weight without what is removed, (out, in), what remains updated as the recipe says, or by SparseGPT as published."""
        if self.rule.score is None and recipe.update == "none":
            return sparsegpt.solve(weight, self.hessian.clone(), self.target)
        return update.solve(weight, self.hessian, self, recipe, self.drift)

    def prune(self, linear: Matrix, recipe: Recipe, held: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune a linear in place. `held` is the Hessian of windows held out.

        Returns whether its weights, and what decided them, are finite; and the errors of its outputs, (2,) or with `held` (4,),
        where an update has changed what stays.
        """
        weight = self.pruned(linear.weight, recipe)
        sound, errors = self.sound & weight.isfinite().all(), None
        if recipe.update != "none" and self.hessian is not None:
            hessians = [self.hessian] if held is None else [self.hessian, held]
            errors = torch.cat([update.relative_errors(linear.weight, weight, hessian) for hessian in hessians])
        linear.weight.copy_(weight)
        return sound, errors


def mask_of(score: torch.Tensor, sparsity: Sparsity, group: str = "row", use_variant: bool = False) -> torch.Tensor:
    """The mask (True = remove) a method's comparison group and a sparsity ask for, (out, in)."""
    if sparsity.m:
        return n_of_m(score, sparsity.n, sparsity.m)
    if sparsity.ratio == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if use_variant:
        return variant(score, sparsity.ratio)
    return whole_matrix(score, sparsity.ratio) if group == "matrix" else per_row(score, sparsity.ratio)
