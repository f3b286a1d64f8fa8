"""Statistics of the inputs of a block's linears, over the samples of all processes."""

from collections import Counter

import torch

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.weights import Matrix
from lib.pruning.activations import observe


def collect(
    decoder: Decoder, i: int, linears: dict[str, Matrix], states: list[State], statistic: type, nsamples: int
) -> dict[str, torch.Tensor | None]:
    """Run the samples through block `i` and return {linear: statistic of its inputs over the samples of all processes}, None
    for one without inputs."""
    with observe(linears, statistic) as observed:
        for state in states:
            decoder.run(i, state.hidden.to(decoder.device), state.kwargs[i])
    first = {}
    own = {name: (first.setdefault(id(seen), name), seen.tokens) for name, seen in observed.items()}
    # An expert may have inputs in other processes only, and linears share there what they see.
    everywhere = parallel.gather(own)
    owners = {name: owner for of_rank in everywhere for name, (owner, _) in of_rank.items()}
    for name in [*owners.values(), *linears]:
        if name not in observed:
            owner = owners.get(name, name)
            observed[name] = observed[owner] if owner in observed else statistic(linears[name].in_features, decoder.device)
    for name in dict.fromkeys(owners[name] for name in linears if name in owners):  # in the same order in every process
        parallel.add_up(observed[name].total)
    tokens = Counter()
    for of_rank in everywhere:
        tokens.update({name: count for name, (_, count) in of_rank.items()})
    return {name: observed[name].result(nsamples) if tokens[name] else None for name in linears}
