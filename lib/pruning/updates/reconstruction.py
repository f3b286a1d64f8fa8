"""Block reconstruction: the surviving weights of a block trained together towards what the dense block put out."""

from collections.abc import Iterator

import torch

from lib import parallel
from lib.models.decoder import Decoder, State
from lib.models.matrices import Matrix

ONE_IN = 8  # windows is held out: not trained on, it says which epoch was best
BATCH = 1  # windows of a step; more where there are more processes, so that each has one


def reconstruct(
    decoder: Decoder,
    i: int,
    linears: dict[str, Matrix],
    states: list[State],
    targets: list[State],
    *,
    count: int,
    epochs: int,
    rate: float,
) -> torch.Tensor:
    """Minimise `mean_t ||f(x)_t - y_t||^2 / ||y_t||^2` over the nonzero weights of `linears`; f is block `i`, resident.

    x is what enters the block in the pruned model, y what leaves it in the dense one, so that a block also makes up for
    the pruning before it (arXiv 2406.15524: global propagation); the loss is `relative_error`. Adam on fp32 copies of the
    weights, by `_adam`'s rates. The weights are those of the best epoch on the windows held out, or the ones it started from.

    Args:
        states, targets: x and y of this process' share of the `count` windows, (1, T, H) each.

    Returns the loss on the windows held out (all of too few to hold any out), before and after: (2,).
    """
    place = {sample: k for k, sample in enumerate(parallel.share(torch.arange(count)).tolist())}
    training, held = torch.arange(count).split([count - count // ONE_IN, count // ONE_IN])
    held = held if len(held) else training
    dtype, device = decoder.model.dtype, decoder.device
    stored, survivors = _trained(linears)
    weights = {name: tensor.to(torch.float32, copy=True).requires_grad_() for name, tensor in stored.items()}

    def loss(j: int) -> torch.Tensor:
        state, target = states[place[j]], targets[place[j]].hidden.to(device)
        values = {name: weight.to(dtype) for name, weight in weights.items()}
        output = decoder.run(i, state.hidden.to(device), state.kwargs[i], weights=values)
        return relative_error(output, target)

    def error() -> float:
        loss_here = sum((loss(j) for j in held.tolist() if j in place), torch.zeros((), device=device))
        return parallel.add_up(loss_here).item() / len(held)

    batch = max(BATCH, parallel.world())
    optimizer, decay = _adam(weights, survivors, rate, epochs * -(-len(training) // batch))
    generator = torch.Generator().manual_seed(i)
    before = best = error()
    for _ in range(epochs):
        for samples in _batches(training, batch, generator):
            for j in samples:
                if j in place:
                    with torch.enable_grad():
                        # In float16, gradients of a mean over tokens would vanish. Adam does not see the scale.
                        scale = states[place[j]].hidden.shape[:-1].numel() if dtype == torch.float16 else 1
                        (loss(j) * scale).backward()
            _add_up_gradients(weights, survivors)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        if (now := error()) < best:
            best = now
            for name, tensor in stored.items():
                tensor.copy_(weights[name])
    return torch.tensor([before, best], device=device)


def _add_up_gradients(weights: dict[str, torch.Tensor], survivors: dict[str, torch.Tensor]) -> None:
    """Make the gradients those of all processes' windows, of surviving weights only."""
    for name, weight in weights.items():
        total = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = parallel.add_up(total).mul_(survivors[name])


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of `||f - y||^2 / ||y||^2`, both (..., H); a token whose target is zero does not count.

    Each token's error is relative to its length, by which the norms of later blocks divide it: otherwise a few tokens, the first
    above all, with states a thousand times as long as others are nearly the whole loss.
    """
    power = target.float().square().sum(dim=-1)
    error = (output.float() - target.float()).square().sum(dim=-1)
    counts = power > torch.finfo(power.dtype).tiny
    return torch.where(counts, error / power.where(counts, 1), 0).sum() / counts.sum().clamp(min=1)


def _trained(linears: dict[str, Matrix]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a block that hold `linears`, by their names in its state, and where each of them may change."""
    stored, survivors = {}, {}
    for linear in linears.values():
        name = linear.tensor_name
        stored.setdefault(name, getattr(linear.module, linear.parameter).detach())
        free = survivors.setdefault(name, torch.zeros_like(stored[name], dtype=torch.bool))
        part = free if linear.index is None else free[linear.index]  # of a stack, only what was pruned
        part.copy_(linear.stored != 0)
    return stored, survivors


def _adam(weights: dict[str, torch.Tensor], survivors: dict[str, torch.Tensor], rate: float, steps: int):
    """Adam, and a schedule: a matrix' rate falls linearly to 0 from `rate` times the root mean square of its survivors, which
    differs tenfold between models."""
    scales = torch.stack([_scale(weight, survivors[name]) for name, weight in weights.items()]).tolist()
    groups = [{"params": [weight], "lr": rate * scale} for weight, scale in zip(weights.values(), scales, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)


def _scale(weight: torch.Tensor, survivors: torch.Tensor) -> torch.Tensor:
    """The root mean square of the survivors, 0 if none are."""
    return (weight.square().mul(survivors).sum() / survivors.sum().clamp(min=1)).sqrt()


def _batches(samples: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """All samples in random order, `size` at a time: one each of as many slices, so that every process has its share of them."""
    slices = [part[torch.randperm(len(part), generator=generator)].tolist() for part in samples.tensor_split(size)]
    for step in range(len(slices[0])):
        yield [part[step] for part in slices if step < len(part)]
