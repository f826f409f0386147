"""Data-parallel training under `torchrun`: every process takes its part of each batch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def add(values: Tensor) -> Tensor:
    """`values` added over all processes, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: int, device: torch.device | str) -> int:
    """The first process's `value`, in all of them."""
    return int(add(torch.tensor(value * first(), device=device)))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, by NCCL on CUDA and by gloo elsewhere, and leave them at the end.

    Yields this process's device: on CUDA under torchrun, the one of its number on its machine.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        gc.collect()  # the model that speaks through the group goes first, and all leave at one time
        dist.barrier()
    finally:
        dist.destroy_process_group()
