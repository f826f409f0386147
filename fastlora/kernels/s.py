"""S = scaling * drop(X) Aᵀ, the down projection: x is read once, S (M, R) written in x's dtype.

Floor: (M * K + R * K + M * R) * itemsize bytes at the device's copy bandwidth. An H200 copies 4.3 TB/s, so M = 8192,
K = 4096 in bfloat16 cannot take less than 67 MB / 4.3 TB/s = 16 us. The products, 2 * M * K * R operations, are small
beside it; the mask costs about ten integer instructions for each element of x and may be the longer of the two.

Programs own BLOCK_M rows and run along K. Where M gives too few of them, K is split: each split writes a float32
partial of S, splits * M * R * 4 bytes written and read again, and a second kernel adds them in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.bank import is_bank, scaled, threshold_of
from fastlora.kernels.dropout import Dropout, arguments, drop, how, keep_signs
from fastlora.kernels.launch import Launch, run
from fastlora.kernels.partials import sum_launches
from fastlora.kernels.product import dot
from fastlora.kernels.tiles import Target, Tile

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank


@triton.jit
def down(
    x_ptr, a_ptr, rows_ptr, seed_ptr, scaling, threshold, start_m, start, end, M,
    stride_xm, stride_xk, stride_ar, stride_ak,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """scaling * drop(x) Aᵀ of BLOCK_M rows, summed over columns start .. end - 1: float32 [BLOCK_M, BLOCK_R]."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < R
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = threshold_of(threshold, rows_ptr, offs_m, M)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(start, end, BLOCK_K):
        mask_k = offs_k < end - k
        columns = (k + offs_k).to(tl.int64)
        x_ptrs = x_rows + columns[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
        a_ptrs = a_rows + columns[:, None] * stride_ak  # [BLOCK_K, BLOCK_R]
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_r & mask_k[:, None], other=0.0)
        if DROPOUT:
            x = drop(x, keep_signs(seed, offs_m, k, threshold, BLOCK_K), DROPOUT)
        acc = dot(x, a.to(x.dtype), acc, INPUT_PRECISION)
    s = scaled(acc, scaling, rows_ptr, offs_m, M, R)
    return tl.where(mask_r, s, 0.0)  # an infinity in x has made NaN of the padding's zeros


@triton.jit(do_not_specialize=["threshold"])
def s_kernel(
    x_ptr, a_ptr, out_ptr, rows_ptr, seed_ptr, scaling, threshold, M, K,
    stride_xm, stride_xk, stride_ar, stride_ak, split_k,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i * BLOCK_M .. of out[j], summed over k in j * split_k .. (j + 1) * split_k - 1."""
    start_m = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    start = split * split_k
    out = down(
        x_ptr, a_ptr, rows_ptr, seed_ptr, scaling, threshold, start_m, start, tl.minimum(start + split_k, K), M,
        stride_xm, stride_xk, stride_ar, stride_ak,
        R, BLOCK_M, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION,
    )  # fmt: skip
    store_rank(out, out_ptr, split, start_m, M, R)


@triton.jit
def store_rank(s, s_ptr, part, start_m, M, R: tl.constexpr):
    """S [BLOCK_M, BLOCK_R] into rows start_m .. of s_ptr[part], (M, R) contiguous."""
    offs_m = start_m + tl.arange(0, s.shape[0])
    offs_r = tl.arange(0, s.shape[1])
    rows = part.to(tl.int64) * M + offs_m
    mask = (offs_m[:, None] < M) & (offs_r[None, :] < R)
    tl.store(s_ptr + rows[:, None] * R + offs_r[None, :], s.to(s_ptr.dtype.element_ty), mask=mask)


def s_launches(
    target: Target, x: Tensor, lora_A: Tensor, scaling: float | Bank, dropout: Dropout | None, S: Tensor,
    tile: Tile | None = None,
) -> list[Launch]:  # fmt: skip
    """S (M, R), contiguous, from x and lora_A."""
    M, K = x.shape
    R = lora_A.shape[0]
    precision = tiles.input_precision(x.dtype, target)
    tile = tile or tiles.rank_tiles("s", target, R, tiles.kind_of(x.dtype, precision), is_bank(scaling))[0]
    splits, split_k = tiles.split_k(target, M, K, tile)
    out = S if splits == 1 else torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    args = {
        "x_ptr": x, "a_ptr": lora_A, "out_ptr": out, **arguments(dropout, scaling), "M": M, "K": K,
        "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_ar": lora_A.stride(0),
        "stride_ak": lora_A.stride(1), "split_k": split_k,
        "R": R, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": tiles.padded_rank(R),
        "DROPOUT": how(target, x.dtype, dropout),
        "INPUT_PRECISION": precision,
    }  # fmt: skip
    first = Launch(s_kernel, (triton.cdiv(M, tile.block_m), splits), args, tile.options)
    return [first, *sum_launches(*[(out, S)] * (splits > 1))]


def s_forward(
    x: Tensor, lora_A: Tensor, scaling: float | Bank, dropout: Dropout | None, tile: Tile | None = None
) -> Tensor:
    """S = scaling * drop(x) @ lora_A.T, accumulated in float32.

    Args:
        x: (M, K), float16, bfloat16 or float32, any strides.
        lora_A: (R, K), x's dtype or float32, any strides; R from 1 to 256.
        scaling: dropout's factor 1 / (1 - p) is in it; or the bank that knows it for each row.
        dropout: None for none.
        tile: instead of the table's.

    Returns:
        (M, R), x's dtype, contiguous.
    """
    S = torch.empty(x.shape[0], lora_A.shape[0], dtype=x.dtype, device=x.device)
    run(s_launches(tiles.target_of(x.device), x, lora_A, scaling, dropout, S, tile))
    return S
