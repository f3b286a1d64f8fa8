"""Block reconstruction: the surviving weights of a block trained together towards what the dense block put out."""

from collections.abc import Iterator

import torch
from torch import nn

from lib import parallel
from lib.models.decoder import Decoder, State

HELD_OUT = 8  # one window of so many is not trained on, and says which epoch was best
BATCH = 2  # windows of a step; more where there are more processes, so that each has one


def reconstruct(
    decoder: Decoder,
    i: int,
    linears: dict[str, nn.Linear],
    states: list[State],
    targets: list[State],
    *,
    count: int,
    epochs: int,
    rate: float,
) -> tuple[float, float]:
    """Minimise `mean((f(x) - y)^2)` over the nonzero weights of `linears`; f is block `i`, which must be resident.

    x is what enters the block in the pruned model, y what leaves it in the dense one, so that a block also makes up for
    the pruning before it (arXiv 2406.15524: global propagation). Adam on fp32 copies of the weights, the rate falling
    linearly to 0. The weights are those of the best epoch on the windows held out, or the ones it started from.

    Args:
        states, targets: x and y of this process' share of the `count` windows.

    Returns:
        `sum((f(x) - y)^2) / sum(y^2)` on the windows held out (all of too few to hold any out), before and after.
    """
    own = {sample: k for k, sample in enumerate(parallel.share(torch.arange(count)).tolist())}
    training, held = torch.arange(count).split([count - count // HELD_OUT, count // HELD_OUT])
    held = [j for j in (held if len(held) else training).tolist() if j in own]
    dtype, device = decoder.model.dtype, decoder.device
    weights = {
        f"{name}.weight": linear.weight.to(torch.float32, copy=True).requires_grad_() for name, linear in linears.items()
    }
    kept = [weight != 0 for weight in weights.values()]

    def loss(j: int) -> torch.Tensor:
        state, target = states[own[j]], targets[own[j]].hidden.to(device)
        values = {name: weight.to(dtype) for name, weight in weights.items()}
        output = decoder.run(i, state.hidden.to(device), state.kwargs[i], weights=values)
        return (output.float() - target.float()).square().sum() / power

    def error() -> float:
        return parallel.add_up(sum((loss(j) for j in held), torch.zeros((), device=device))).item()

    power = sum((targets[own[j]].hidden.to(device).float().square().sum() for j in held), torch.zeros((), device=device))
    power = parallel.add_up(power)
    batch = max(BATCH, parallel.world())
    steps = -(-len(training) // batch)
    optimizer = torch.optim.Adam(weights.values(), lr=rate, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps)
    generator = torch.Generator().manual_seed(i)
    before = best = error()
    for _ in range(epochs):
        for samples in _batches(training, batch, generator):
            for j in samples:
                if j in own:
                    with torch.enable_grad():
                        loss(j).backward()
            for weight, mask in zip(weights.values(), kept, strict=True):
                total = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = parallel.add_up(total).mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        if (now := error()) < best:
            best = now
            for name, linear in linears.items():
                linear.weight.copy_(weights[f"{name}.weight"])
    return before, best


def _batches(samples: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """All samples in random order, `size` at a time: one each of as many slices, so that every process has its share of them."""
    slices = [part[torch.randperm(len(part), generator=generator)].tolist() for part in samples.tensor_split(size)]
    for step in range(len(slices[0])):
        yield [part[step] for part in slices if step < len(part)]
