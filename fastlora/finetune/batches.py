"""Batches of a data set that is held in memory: what the trainer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastlora.finetune.parallel import ALONE, World

Batch = tuple[Tensor, ...]  # the model's inputs, then the labels


class Batches:
    """Batches of rows; the order of an epoch is a pure function of the seed and the epoch's number.

    So a position in an epoch is one integer: nothing else is needed to go on from there.

    Args:
        size: rows in the data set.
        take: row numbers (int64 tensor on the CPU) -> batch: the model's inputs, and last the labels.
        batch_size: rows per batch, in each of the processes that train together.
        seed: shuffle by it; None keeps the rows in order.
        drop_last: leave out the last batch when it is short.
        device: where the batches go. Copies to a GPU are asynchronous, from pinned memory.
        world: the processes that train together: batches are `world.size` times as large, and each takes its part.
    """

    def __init__(
        self,
        size: int,
        take: Callable[[Tensor], Batch],
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        world: World = ALONE,
    ):
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}")
        self.size, self.take, self.batch_size, self.world = size, take, batch_size * world.size, world
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
        """This process's parts of the batches of epoch `number`, from batch `start` on.

        A last batch of fewer rows than there are processes leaves some with a batch of no rows but the labels' tensor.
        """
        order = self.order(number)
        for i in range(start, len(self)):
            part = self.world.part(self._batch(order, i))
            yield self._place(self.take(part) if len(part) else (torch.empty(0, dtype=torch.int64),))

    def shared(self) -> Iterator[Batch]:
        """Whole batches of epoch 0, dealt out to the processes in turn: for evaluation, where nothing is exchanged."""
        order = self.order(0)
        for i in range(self.world.rank, len(self), self.world.size):
            yield self._place(self.take(self._batch(order, i)))

    def rows(self, i: int) -> int:
        """The rows of batch `i`, over all processes."""
        return min(self.batch_size, self.size - i * self.batch_size)

    def _batch(self, order: Tensor, i: int) -> Tensor:
        return order[i * self.batch_size : (i + 1) * self.batch_size]

    __iter__ = epoch

    def _place(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return tuple(
            (t.pin_memory() if t.device.type == "cpu" else t).to(self.device, non_blocking=True) for t in batch
        )
