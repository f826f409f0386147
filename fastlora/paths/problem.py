"""What a path is chosen for: the sizes and types of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
