"""What a path is chosen for: the sizes and types of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """One call of the layer. M tokens, N out_features, K in_features, R rank; hashable, to keep a choice by."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    dropout: bool

    @property
    def empty(self) -> bool:
        """Whether there is nothing to multiply. Such calls are ATen's: kernels take sizes from 1."""
        return self.M == 0 or self.N == 0 or self.K == 0


def rows(t: Tensor) -> Tensor:
    """(..., K) as (M, K), a view wherever strides allow one. `reshape(-1, K)` cannot tell M when K is 0."""
    dims = t.dim()
    return t if dims == 2 else t.flatten(0, -2) if dims > 2 else t.unsqueeze(0)
