"""Statistics of the inputs of a block's linears, over the samples of all processes."""

import logging
from collections import Counter
from collections.abc import Collection
from functools import partial

import torch

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.weights import Matrix, kind_of
from lib.pruning.activations import observe
from lib.pruning.asymmetric import Drift, Stream

logger = logging.getLogger(__name__)

FEW_TOKENS = 64  # the statistics of an expert that fewer reach say little
SHOWN = 5  # names in a log line


def collect(
    decoder: Decoder,
    i: int,
    linears: dict[str, Matrix],
    states: list[State],
    statistic: type,
    nsamples: int,
    dense: list[State] | None = None,
    text: str = "calibration",
) -> dict[str, torch.Tensor | None]:
    """Run the samples through block `i` and return {linear: statistic of its inputs over the samples of all processes}, None
    for one without inputs. Linears that are given the same inputs (q, k and v) have the same tensor: it is not to be changed.

    With `dense`, the same samples in the dense model, these pass the block as well, and the statistic is `Drift` of both.
    `text` says in warnings whose tokens they are.
    """
    stream = Stream()
    if dense is not None:
        statistic = partial(Drift, stream=stream)
    with observe(linears, statistic) as observed:
        for k, state in enumerate(states):
            if dense is not None:
                stream.dense, stream.tokens = True, state.hidden.numel() // state.hidden.shape[-1]
                decoder.advance(i, [dense[k]])
                stream.dense = False
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
        for total in observed[name].sums:
            parallel.add_up(total)
    tokens = Counter()
    for of_rank in everywhere:
        tokens.update({name: count for name, (_, count) in of_rank.items()})
    few = [name for name in linears if kind_of(name) != name and 0 < tokens[name] < FEW_TOKENS]
    point_out(decoder.prefixes[i], few, len(linears), f"had fewer than {FEW_TOKENS} {text} tokens")
    distinct = {id(observed[name]): observed[name] for name in linears if tokens[name]}
    results = {key: seen.result(nsamples) for key, seen in distinct.items()}
    return {name: results[id(observed[name])] if tokens[name] else None for name in linears}


def point_out(prefix: str, names: Collection[str], count: int, what: str) -> None:
    """Say what holds for `names` of a block's `count` matrices, if any."""
    if names:
        shown = ", ".join(sorted(names)[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
        logger.warning("%d of %d matrices in %s %s: %s", len(names), count, prefix.removesuffix("."), what, shown)
