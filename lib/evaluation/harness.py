"""A model of ours as lm-evaluation-harness sees it. The only module that cannot be imported without the package lm_eval."""

import copy
import logging
import sys

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from lib import parallel


class InMemory(HFLM):
    """A model that is in memory already. Of several processes each answers its share of the requests."""

    def __init__(self, model: torch.nn.Module, tokenizer, batch: int):
        said = logging.getLogger(lm_eval.models.huggingface.__name__)
        level = said.level
        said.setLevel(logging.ERROR)  # it warns that models in memory are not its usual case
        model.tie_weights = lambda: None  # it would tie weights that only the config calls tied
        try:
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
        finally:
            del model.tie_weights
            said.setLevel(level)
        self._rank, self._world_size = parallel.rank(), parallel.world()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's number."""
        return torch.tensor(parallel.gather(tensor.item()))

    def gather_object(self, obj, dst: int = 0) -> list:
        """Every rank's `obj`, on all of them."""
        return parallel.gather(obj)

    def barrier(self) -> None:
        """Return when every rank has called this."""
        parallel.wait()


def _on_a_terminal(*args, disable: bool = False, **options) -> tqdm:
    return tqdm(*args, disable=disable or not sys.stderr.isatty(), **options)


for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
    module.tqdm = _on_a_terminal  # a log file is no place for its bars

# They start git, pip and lscpu, for what nobody here reads.
lm_eval.evaluator.get_git_commit_hash = lambda: None
lm_eval.evaluator.add_env_info = lambda results: None
