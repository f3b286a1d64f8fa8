"""Several processes as one: every rank takes a slice of the samples, sums are all-reduced. One process needs none of it.

Started by `torchrun` or `accelerate launch`; gloo on CPUs, NCCL on GPUs.
"""

import os

import torch
import torch.distributed as dist


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
    """Leave the group, after all have come this far."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process' number; rank 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


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


def gather(value) -> list:
    """Every rank's `value`, in the order of ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values
