"""Data-parallel training under `torchrun`: every process takes its part of each batch; gradients are added up."""

from __future__ import annotations

from collections.abc import Sequence
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
        """This process's part of `rows`: contiguous, and as long as the others' to within one."""
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]


ALONE = World()


def start(device: torch.device) -> tuple[World, torch.device]:
    """Join the processes that `torchrun` started, by NCCL on CUDA and by gloo elsewhere.

    Returns the world (`ALONE` without torchrun) and this process's device: on CUDA, the one of its number on its
    machine.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size()), device


def stop() -> None:
    """Leave the processes joined by `start`, once all of them are here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def told(value: bool, world: World, device: torch.device) -> bool:
    """The first process's `value`, in all of them."""
    if world.size == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.broadcast(flag, 0)
    return bool(flag)


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Add each parameter's gradient over all processes, in one exchange; one without a gradient counts as zero."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1).float() for p in parameters])
    dist.all_reduce(flat)
    for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(total.view_as(p))


def add(values: Tensor, world: World) -> Tensor:
    """`values` added over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def gather(value: Tensor, world: World, device: torch.device) -> Tensor:
    """The values (same shape everywhere) of all processes, stacked along a new first dimension, on the CPU."""
    if world.size == 1:
        return value.cpu()[None]
    parts = [torch.empty_like(value, device=device) for _ in range(world.size)]
    dist.all_gather(parts, value.to(device))
    return torch.stack(parts).cpu()


def same_everywhere(parameters: Sequence[Tensor], world: World) -> None:
    """Give every process the first one's values."""
    if world.size > 1:
        for p in parameters:
            dist.broadcast(p.data, 0)
