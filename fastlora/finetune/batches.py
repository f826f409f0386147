"""Batches of a data set that is held in memory: what the trainer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]  # the model's inputs, then the labels


class Batches:
    """Batches of rows; the order of an epoch is a pure function of the seed and the epoch's number.

    So a position in an epoch is one integer: nothing else is needed to go on from there.

    Args:
        size: rows in the data set.
        take: row numbers (int64 tensor on the CPU) -> batch: the model's inputs, and last the labels.
        batch_size: rows per batch.
        seed: shuffle by it; None keeps the rows in order.
        drop_last: leave out the last batch when it is short.
        device: where the batches go. Copies to a GPU are asynchronous, from pinned memory.
    """

    def __init__(
        self,
        size: int,
        take: Callable[[Tensor], Batch],
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ):
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}")
        self.size, self.take, self.batch_size = size, take, batch_size
        self.seed, self.drop_last, self.device = seed, drop_last, torch.device(device)

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The row numbers in the order of epoch `epoch`, int64 (size,)."""
        if self.seed is None:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, from batch `start` on."""
        order = self.order(number)
        for i in range(start, len(self)):
            yield self._place(self.take(order[i * self.batch_size : (i + 1) * self.batch_size]))

    __iter__ = epoch

    def _place(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return tuple(
            (t.pin_memory() if t.device.type == "cpu" else t).to(self.device, non_blocking=True) for t in batch
        )
