"""Data-parallel training under `torchrun`: every process takes its part of each batch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """This process's part of `rows`."""
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def add(self, values: Tensor) -> Tensor:
        """`values` added over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: int, device: torch.device) -> int:
        """The first process's `value`, in all of them."""
        return int(self.add(torch.tensor(value * self.first, device=device)))


ALONE = World()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that `torchrun` started, by NCCL on CUDA and by gloo elsewhere, and leave them at the end.

    Yields the world (`ALONE` without torchrun) and this process's device: on CUDA, the one of its number on its
    machine.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
        gc.collect()  # the model that speaks through the group goes first, and all leave at one time
        dist.barrier()
    finally:
        dist.destroy_process_group()
