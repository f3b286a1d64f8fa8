"""The table of methods: which formula scores a weight, what it is made from, and what weights compete in.

A method is a row of `METHODS`; the command line takes its choices from there, and `prune.py` does what the row says.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.pruning import scores
from lib.pruning.statistics import ActivationNorm, ExactHessian, Hessian
from lib.pruning.targets import Targets
from lib.pruning.updates.recipe import PUBLISHED, Recipe

PAPER_ALPHA = 100.0  # arXiv 2311.04902, section 4; the published gradient files have it baked in as their scale
MAX_ALPHA = 1e30  # scores are fp32, and above 1e8 the activation term is lost in their rounding anyway

Score = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]  # (weight, x_norm, grad_norm)


@dataclass(frozen=True)
class Method:
    """A row of the table. `score` is a formula of scores.py, given whichever of ||X||, ||G|| and alpha the row names."""

    score: Callable
    statistic: type | None = None  # of a linear's inputs, to have ||X|| from; None: the method does not look at activations
    gradients: bool = False  # takes ||G||
    alpha: bool = False  # takes the weight of the gradient term
    group: str = "row"  # what weights compete in when unstructured: "row" or "matrix"
    variant: bool = False  # accepts --use_variant
    inverse: Callable | None = None  # the formula under --gradient_inv, which takes no alpha
    solver: bool = False  # SparseGPT's solver chooses the mask, and updates as published; the score only orders stages

    def __post_init__(self):
        if (self.alpha or self.inverse) and not self.gradients:
            raise ValueError("alpha and inverse are about the gradient term: the row needs gradients=True")

    def observes(self, recipe: Recipe = PUBLISHED) -> type | None:
        """The statistic that method and recipe need: a Hessian's diagonal holds the activation norm as well."""
        return self.statistic if recipe.update == "none" else ExactHessian

    def formula(self, alpha: float = 1.0, gradient_inv: bool = False) -> Score:
        """The formula as a function of (weight, x_norm, grad_norm), whichever of them it takes."""
        measure = self.inverse if gradient_inv else self.score
        weight_of_term = {"alpha": alpha} if self.alpha and not gradient_inv else {}

        def score(weight: torch.Tensor, x_norm: torch.Tensor | None, grad_norm: torch.Tensor | None) -> torch.Tensor:
            factors = {"x_norm": x_norm} if self.statistic else {}
            if self.gradients:
                factors["grad_norm"] = grad_norm.to(weight.device, non_blocking=True)
            return measure(weight, **factors, **weight_of_term)

        return score


METHODS = {
    "magnitude": Method(scores.magnitude, group="matrix"),
    "wanda": Method(scores.wanda, ActivationNorm, variant=True),
    "gradient": Method(scores.gradient, gradients=True, inverse=scores.gradient_inverse),
    "gblm": Method(scores.gblm, ActivationNorm, gradients=True, alpha=True, variant=True, inverse=scores.gblm_inverse),
    "sparsegpt": Method(scores.wanda, Hessian, solver=True),
}


@dataclass(frozen=True)
class Settings:
    """How a model is pruned.

    `method`: a row of METHODS. `targets`: how much of which linear. `alpha`: the weight of the gradient term, applied to gradient
    norms as they are given. `use_variant`, `gradient_inv`: the flags of that name. `recipe`: what becomes of the weights that stay.
    """

    method: str
    targets: Targets
    alpha: float = 1.0
    use_variant: bool = False
    gradient_inv: bool = False
    recipe: Recipe = PUBLISHED

    @property
    def rule(self) -> Method:
        """The method's row."""
        return METHODS[self.method]

    @property
    def score(self) -> Score:
        """(weight, x_norm, grad_norm) -> importance, (out, in)."""
        return self.rule.formula(self.alpha, self.gradient_inv)

    @property
    def group(self) -> str:
        """What weights compete in, as `masks.mask_of` takes it."""
        return "variant" if self.use_variant else self.rule.group

    @property
    def statistic(self) -> type | None:
        """What is to be known of a linear's inputs."""
        return self.rule.observes(self.recipe)

    @property
    def masks_only(self) -> bool:
        """Whether a linear is only masked, as published for all methods but SparseGPT."""
        return not self.rule.solver and self.recipe.update == "none"

    @property
    def changes_survivors(self) -> bool:
        """Whether weights that stay are other than before."""
        return self.rule.solver or self.recipe.changes_survivors

    @property
    def needs_windows(self) -> bool:
        """Whether calibration windows have to run through the model."""
        return self.statistic is not None or self.recipe.epochs > 0
