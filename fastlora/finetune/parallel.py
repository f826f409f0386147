"""Data-parallel training under `torchrun`: every process takes its part of each batch."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastlora.finetune.options import pick_device


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


def joined(train: Callable) -> Callable:
    """A program's `train(args, device)` as one of `args` that joins the processes which `torchrun` started, if it did.

    They speak by NCCL on CUDA, where each has the device of its number on its machine, and by gloo elsewhere.
    """

    def together(args) -> None:
        device = pick_device(args.device)
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return train(args, device)
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            train(args, device)
            gc.collect()  # the model that speaks through the group goes first, and all leave at one time
            dist.barrier()
        finally:
            dist.destroy_process_group()

    return together
