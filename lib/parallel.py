"""Several processes as one: every rank takes a slice of the samples, sums are all-reduced. One process needs none of it.

Started by `torchrun` or `accelerate launch`; gloo on CPUs, NCCL on GPUs.
"""

import os

import torch
import torch.distributed as dist

_rank_before = 0  # of this process in a group that it has left


def start(device: torch.device) -> torch.device:
    """Join the other ranks, if a launcher started any; returns the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # NCCL adds up what is on GPUs alone; what is counted on the host goes over gloo there as well.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the group, after all have come this far; `rank` stays what it was."""
    global _rank_before
    if dist.is_initialized():
        wait()
        _rank_before = rank()
        dist.destroy_process_group()


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process' number; rank 0 prints, and writes what is not divided among the processes."""
    return dist.get_rank() if dist.is_initialized() else _rank_before


def local_world() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def wait() -> None:
    """Return when every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def share(samples: torch.Tensor) -> torch.Tensor:
    """This rank's slice of (n, ...) samples; the slices differ by at most one sample, and are empty for ranks beyond n."""
    return samples.tensor_split(world())[rank()]


def add_up(total: torch.Tensor) -> torch.Tensor:
    """The sum of `total` (dense) over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def add_up_at(total: torch.Tensor, owner: int) -> torch.Tensor:
    """As `add_up`, but only rank `owner` has the sum afterwards; what the others have is neither. Half the traffic."""
    if dist.is_initialized():
        dist.reduce(total, dst=owner)
    return total


def gather(value) -> list:
    """Every rank's `value`, in the order of ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values
