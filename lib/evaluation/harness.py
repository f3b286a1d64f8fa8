"""A `Decoder`'s model in the form that lm-evaluation-harness takes. The only module that needs lm_eval to be imported."""

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
    """A model that is in memory already. If there are several processes, each answers its share of the requests."""

    def __init__(self, model: torch.nn.Module, tokenizer, batch: int):
        their_logger = logging.getLogger(lm_eval.models.huggingface.__name__)
        level = their_logger.level
        their_logger.setLevel(logging.ERROR)  # HFLM warns that a model in memory is not its usual case
        model.tie_weights = lambda: None  # HFLM would tie weights that are tied in the config only
        try:
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
        finally:
            del model.tie_weights
            their_logger.setLevel(level)
        self._rank, self._world_size = parallel.rank(), parallel.world()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with every process' number."""
        return torch.tensor(parallel.gather(tensor.item()))

    def gather_object(self, obj, dst: int = 0) -> list:
        """The `obj` of every process, in all of them."""
        return parallel.gather(obj)

    def barrier(self) -> None:
        """Return when every process has called this."""
        parallel.wait()


def _on_a_terminal(*args, disable: bool = False, **options) -> tqdm:
    return tqdm(*args, disable=disable or not sys.stderr.isatty(), **options)


for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
    module.tqdm = _on_a_terminal  # a log file is not a place for progress bars

# They start git, pip and lscpu to collect what nobody reads here.
lm_eval.evaluator.get_git_commit_hash = lambda: None
lm_eval.evaluator.add_env_info = lambda results: None
