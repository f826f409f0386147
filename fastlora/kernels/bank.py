"""What differs from row to row where several adapters lie side by side (paths/bank.py): their factors and dropout.

A kernel's `scaling` and `threshold` are numbers. With `rows_ptr`, the adapter of each row, int32 (M,), they are
pointers to a table that has a row for each adapter and one for none: the factors, float32 (adapters + 1, R), 0 at the
ranks of other adapters, and the thresholds, int32 (adapters + 1,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank


@triton.jit
def scaled(acc, scaling, rows_ptr, offs_m, M, R):
    """acc [BLOCK_M, BLOCK_R], rows `offs_m` of S or dS, times what is due to them; whatever stood there, 0 for none."""
    if rows_ptr is None:
        acc = acc * scaling
    else:
        offs_r = tl.arange(0, acc.shape[1])
        mask_m = offs_m < M
        adapter = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
        factor_ptrs = scaling + adapter[:, None] * R + offs_r[None, :]
        factor = tl.load(factor_ptrs, mask=mask_m[:, None] & (offs_r[None, :] < R), other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = tl.where(factor != 0.0, acc * factor, 0.0)
    return acc


@triton.jit
def threshold_of(threshold, rows_ptr, offs_m, M):
    """What the bits of rows `offs_m` must reach: one number, or [BLOCK_M, 1]."""
    if rows_ptr is not None:
        threshold = tl.load(threshold + tl.load(rows_ptr + offs_m, mask=offs_m < M, other=0))[:, None]
    return threshold


def is_bank(number: float | Bank) -> bool:
    """Whether a scaling or a probability is a bank, which knows it for each row."""
    return not isinstance(number, (int, float))


def scale(scaling: float | Bank) -> dict[str, float | Tensor | None]:
    """The arguments `rows_ptr` and `scaling` of a kernel."""
    if is_bank(scaling):
        return {"rows_ptr": scaling.rows, "scaling": scaling.factors}
    return {"rows_ptr": None, "scaling": float(scaling)}  # an int would be compiled in
