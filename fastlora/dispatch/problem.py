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


def rides_on_gemm(scaling: float) -> bool:
    """Whether BLAS takes the factor as its alpha: at one that float32 holds as 0 it would look at no operand and lose
    its NaN, and one beyond float32 it refuses."""
    return 1e-37 < abs(scaling) < 1e37


def check_saved(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, S: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None
) -> None:
    """Refuse what hooks of saved tensors have made of them: kernels read addresses. One expression when all is well."""
    (M, N), (R, K), dtype, adapter_dtype, device = dy.shape, lora_A.shape, dy.dtype, lora_A.dtype, dy.device
    if (
        S.dtype is dtype
        and S.shape == (M, R)
        and lora_B.dtype is adapter_dtype
        and lora_B.shape == (N, R)
        and S.device == lora_A.device == lora_B.device == device
        and (seed is None or (seed.dtype is torch.int64 and seed.numel() == 1 and seed.device == device))
        and (x is None or (x.dtype is dtype and x.shape[-1] == K and x.shape[:-1].numel() == M and x.device == device))
        and (weight is None or (weight.dtype is dtype and weight.shape == (N, K) and weight.device == device))
    ):
        return
    expected = {"S": (S, (M, R), dtype), "x": (x, (M, K), dtype), "weight": (weight, (N, K), dtype)}
    expected |= {"lora_A": (lora_A, (R, K), adapter_dtype)}
    expected |= {"lora_B": (lora_B, (N, R), adapter_dtype), "the dropout seed": (seed, (), torch.int64)}
    for name, (t, shape, kind) in expected.items():
        if t is None:
            continue
        found = rows(t).shape if name == "x" else t.squeeze().shape if t is seed else t.shape
        if found != shape or t.dtype is not kind or t.device != device:
            raise RuntimeError(
                f"{name} came back from saved-tensor hooks as {tuple(t.shape)} {t.dtype} on {t.device}; backward needs "
                f"{shape} {kind} on {device}"
            )
