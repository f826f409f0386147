"""`Bank`: several adapters as one, whose S is block-diagonal.

lora_A (ΣR, K) and lora_B (N, ΣR) hold all of them side by side. A row of x belongs to one adapter or to none, and S and
dS are zero outside its ranks: then S Bᵀ, dYᵀ S, dSᵀ x and dS A are the products of one adapter, and each adapter gets
what its own rows give. What differs from row to row is a factor for each rank, and the chance that x is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastlora.paths.mask import threshold

_STEP = 0x5851F42D4C957  # between the seeds of adapters


@dataclass(frozen=True, eq=False)
class Bank:
    """Which rows are whose, and what each adapter does with its own.

    Attributes:
        ranks, scalings, ps: of each adapter; a `p` is the probability of its dropout.
        runs: (start, stop, adapter): rows of one adapter that lie together, in order; rows in no run have no adapter.
        M: all rows.
        device: of x.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    ps: tuple[float, ...]
    runs: tuple[tuple[int, int, int], ...]
    M: int
    device: torch.device

    @classmethod
    def of(cls, ranks, scalings, ps, owners: Sequence[int | None], each: int, device: torch.device) -> Bank:
        """The bank of a batch: the adapter of each sample, or None, where a sample is `each` rows."""
        runs: list[list[int]] = []
        for sample, owner in enumerate(owners):
            if owner is None:
                continue
            if runs and runs[-1][1:] == [sample * each, owner]:
                runs[-1][1] += each
            else:
                runs.append([sample * each, (sample + 1) * each, owner])
        return cls(tuple(ranks), tuple(scalings), tuple(ps), tuple(map(tuple, runs)), len(owners) * each, device)

    @cached_property
    def order(self) -> Tensor | None:
        """Rows such that each adapter's lie together, int64; None where they do already."""
        if len(self.runs) == len({adapter for *_, adapter in self.runs}):
            return None
        return torch.argsort(self.rows, stable=True)

    @cached_property
    def grouped(self) -> tuple[tuple[int, int, int], ...]:
        """`runs` of rows in `order`: one of each adapter that has rows."""
        counts, found, at = Counter(), [], 0
        for start, stop, adapter in self.runs:
            counts[adapter] += stop - start
        for adapter in sorted(counts):
            found.append((at, at + counts[adapter], adapter))
            at += counts[adapter]
        return self.runs if self.order is None else tuple(found)

    @cached_property
    def column(self) -> Tensor:
        """The scaling of each rank, float32 (ΣR, 1)."""
        return torch.tensor(self.scalings).repeat_interleave(torch.tensor(self.ranks))[:, None].to(self.device)

    def seeds(self, seed: Tensor) -> Tensor:
        """A seed for each adapter, whose masks count rows from 0."""
        return seed + _STEP * torch.arange(len(self.ranks), device=seed.device)

    @property
    def R(self) -> int:
        return sum(self.ranks)

    @property
    def drops(self) -> bool:
        return any(p > 0.0 for p in self.ps)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first rank of each adapter."""
        return tuple(sum(self.ranks[:i]) for i in range(len(self.ranks)))

    @cached_property
    def rows(self) -> Tensor:
        """The adapter of each row, int32 (M,); the number of adapters for none."""
        found = torch.full((self.M,), len(self.ranks), dtype=torch.int32)
        for start, stop, adapter in self.runs:
            found[start:stop] = adapter
        return found.to(self.device)

    @cached_property
    def factors(self) -> Tensor:
        """What S and dS are multiplied by, float32 (adapters + 1, ΣR): s / (1 - p) at an adapter's own ranks, else 0.
        Zero means that the rank is not there: whatever stood there, NaN too, becomes 0."""
        found = torch.zeros(len(self.ranks) + 1, self.R)
        for i, (start, r, scaling, p) in enumerate(zip(self.starts, self.ranks, self.scalings, self.ps, strict=True)):
            found[i, start : start + r] = scaling / (1.0 - p) if p < 1.0 else 0.0
        return found.to(self.device)

    @cached_property
    def thresholds(self) -> Tensor:
        """What 16 random bits of an element must reach for it to be kept, int32 (adapters + 1,)."""
        return torch.tensor([*map(threshold, self.ps), 0], dtype=torch.int32).to(self.device)

    @cached_property
    def by_row(self) -> Tensor:
        """`factors` of each row, float32 (M, ΣR)."""
        return self.factors[self.rows]

    def masked(self, S: Tensor) -> Tensor:
        """S (M, ΣR) times the factors of its rows, in its dtype; differentiable."""
        return torch.where(self.by_row != 0.0, S * self.by_row.to(torch.promote_types(S.dtype, torch.float32)), 0.0).to(
            S.dtype
        )
