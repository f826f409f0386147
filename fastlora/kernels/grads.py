"""The small gradients.

    dS = scaling * dY B   (M, R)        dB = dYᵀ S   (N, R)        dA = dSᵀ drop(X)   (R, K)

`ds_db` reads dY once for two sums that run in different directions, over N for dS and over M for dB, without atomics.
A program owns a region of region_m rows and BLOCK_N columns and walks down its rows, BLOCK_M at a time: its dB
[BLOCK_N, R] stays in registers to the end, each step's dS [BLOCK_M, R] is finished for the region and stored. Where
one region spans all columns (or all rows) that is the result; otherwise it is a float32 partial, and a second kernel
adds the partials of both in order. With P_n = cdiv(N, BLOCK_N) and P_m = cdiv(M, region_m) the partials cost, each
written once and read once,

    2 * 4 * R * (P_n * M + P_m * N) bytes

beside the M * N * itemsize of dY: for M = 8192, N = 4096, R = 16 in bfloat16 and regions of 512 x 512, 2 * 8.4 MB
beside 67 MB, and the partials fit the L2 cache of a data-centre GPU. BLOCK_N * R is bounded by the registers of a
program, so the first term grows with the square of R; where the tables have no region (R > 32 in general) that would
cost more than reading dY a second time, and dS and dB take one reader each: the kernels of S and of dA with other
operands.

`da` reads x once, splits M where K gives too few programs (splits * R * K * 4 bytes of partials, written and read), and
makes the mask again.

Floors at the device's copy bandwidth (an H200: 4.3 TB/s): M * N * itemsize bytes for `ds_db`, M * K * itemsize for
`da`; the operands and results of rank R are R / M, R / N or R / K of that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.dropout import Dropout, drop_tile, keep_scale
from fastlora.kernels.partials import sum_partials, sum_partials_pair
from fastlora.kernels.s import s_forward
from fastlora.kernels.tiles import input_precision, padded_rank, target_of
from fastlora.kernels.tiles_small import da_cut, ds_db_cut, kind_of


@triton.jit
def ds_db_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, scaling, M, N,
    stride_ym, stride_yn, stride_bn, stride_br, region_m,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALING_POINTER: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns i * BLOCK_N .. and rows j * region_m ..; writes dS partial i and dB partial j."""
    part_n = tl.program_id(0)
    part_m = tl.program_id(1)
    offs_n = part_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    columns = offs_n.to(tl.int64)
    b_ptrs = b_ptr + columns[:, None] * stride_bn + offs_r[None, :] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    b = b.to(dy_ptr.dtype.element_ty)
    factor = tl.load(scaling).to(tl.float32) if SCALING_POINTER else scaling
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    start = part_m * region_m
    end = tl.minimum(start + region_m, M)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        rows = offs_m.to(tl.int64)
        mask_mr = mask_m[:, None] & mask_r[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_ym + columns[None, :] * stride_yn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        s = tl.load(s_ptr + rows[:, None] * R + offs_r[None, :], mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
        db = tl.dot(tl.trans(dy), s, db, input_precision=INPUT_PRECISION)
        ds = tl.dot(dy, b, input_precision=INPUT_PRECISION) * factor
        ds_ptrs = ds_ptr + (part_n.to(tl.int64) * M + rows)[:, None] * R + offs_r[None, :]
        tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask_mr)
    db_ptrs = db_ptr + (part_m.to(tl.int64) * N + offs_n)[:, None] * R + offs_r[None, :]
    tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["threshold"])
def da_kernel(
    ds_ptr, x_ptr, da_ptr, seed_ptr, threshold, M, K, stride_sm, stride_sr, stride_xm, stride_xk, split_m,
    stride_dr, stride_dk,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns i * BLOCK_K .. of partial j, summed over rows j * split_m .. (j + 1) * split_m - 1."""
    start_k = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k[None, :] < K
    mask_r = offs_r[:, None] < R
    columns = offs_k.to(tl.int64)
    start = split * split_m
    end = tl.minimum(start + split_m, M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        rows = offs_m.to(tl.int64)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
        ds_ptrs = ds_ptr + rows[None, :] * stride_sm + offs_r[:, None] * stride_sr  # [BLOCK_R, BLOCK_M]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0)
        ds = tl.load(ds_ptrs, mask=mask_r & mask_m[None, :], other=0.0)
        if DROPOUT:
            x = drop_tile(x, seed, offs_m, start_k, threshold, BLOCK_K)
        acc = tl.dot(ds, x, acc, input_precision=INPUT_PRECISION)
    if DROPOUT:
        acc *= keep_scale(threshold)
    da_ptrs = da_ptr + split.to(tl.int64) * (R * K) + offs_r[:, None] * stride_dr + columns[None, :] * stride_dk
    tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=mask_r & mask_k)


def ds_db(
    dy: torch.Tensor, lora_B: torch.Tensor, S: torch.Tensor, scaling: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = scaling * dy @ lora_B and dB = dy.T @ S, accumulated in float32, from one read of dy (two from R = 64 on).

    Args:
        dy: (M, N), float16, bfloat16 or float32, any strides.
        lora_B: (N, R), dy's dtype or float32, any strides; R from 1 to 128.
        S: (M, R), dy's dtype, contiguous; it holds `scaling` already.
        scaling: a number, or a tensor of one element on dy's device, read there.

    Returns:
        dS (M, R) in dy's dtype and dB (N, R) in lora_B's, both contiguous.
    """
    M, N = dy.shape
    R = lora_B.shape[1]
    target = target_of(dy.device)
    precision = input_precision(dy.dtype, target)
    cut = ds_db_cut(target, M, N, R, kind_of(dy.dtype, precision))
    dB = torch.empty(N, R, dtype=lora_B.dtype, device=dy.device)
    if cut is None:
        _thin_product(S, dy, None, dB, 1, R)
        return s_forward(dy, lora_B.t(), scaling, None), dB
    tile, region_m = cut
    parts_n, parts_m = triton.cdiv(N, tile.block_n), triton.cdiv(M, region_m)
    dS = torch.empty(M, R, dtype=dy.dtype, device=dy.device)
    ds = dS if parts_n == 1 else torch.empty(parts_n, M, R, dtype=torch.float32, device=dy.device)
    db = dB if parts_m == 1 else torch.empty(parts_m, N, R, dtype=torch.float32, device=dy.device)
    ds_db_kernel[(parts_n, parts_m)](
        dy, lora_B, S, ds, db,
        scaling if isinstance(scaling, torch.Tensor) else float(scaling),
        M, N, dy.stride(0), dy.stride(1), lora_B.stride(0), lora_B.stride(1), region_m,
        R=R, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=padded_rank(R),
        SCALING_POINTER=isinstance(scaling, torch.Tensor), INPUT_PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if parts_n > 1 and parts_m > 1:
        sum_partials_pair(ds, dS, db, dB)
    elif parts_n > 1:
        sum_partials(ds, dS)
    elif parts_m > 1:
        sum_partials(db, dB)
    return dS, dB


def da(dS: torch.Tensor, x: torch.Tensor, dropout: Dropout | None, dtype: torch.dtype) -> torch.Tensor:
    """dA = dS.T @ drop(x), accumulated in float32.

    Args:
        dS: (M, R), x's dtype, any strides; R from 1 to 128.
        x: (M, K), float16, bfloat16 or float32, any strides.
        dropout: what the forward pass used; None for none.
        dtype: of the result, lora_A's.

    Returns:
        (R, K), `dtype`, contiguous.
    """
    R, K = dS.shape[1], x.shape[1]
    dA = torch.empty(R, K, dtype=dtype, device=x.device)
    _thin_product(dS, x, dropout, dA, K, 1)
    return dA


def _thin_product(
    dS: torch.Tensor, x: torch.Tensor, dropout: Dropout | None, out: torch.Tensor, stride_dr: int, stride_dk: int
) -> None:
    """out[r * stride_dr + k * stride_dk] = (dS.T @ drop(x))[r, k] for a contiguous `out` of R * K elements."""
    M, K = x.shape
    R = dS.shape[1]
    target = target_of(x.device)
    precision = input_precision(x.dtype, target)
    tile, splits, split_m = da_cut(target, M, K, R, kind_of(x.dtype, precision))
    partials = out if splits == 1 else torch.empty(splits, R * K, dtype=torch.float32, device=x.device)
    da_kernel[(triton.cdiv(K, tile.block_k), splits)](
        dS, x, partials,
        x if dropout is None else dropout.seed,
        0 if dropout is None else dropout.threshold,
        M, K, dS.stride(0), dS.stride(1), x.stride(0), x.stride(1), split_m, stride_dr, stride_dk,
        R=R, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=padded_rank(R),
        DROPOUT=dropout is not None, INPUT_PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(partials, out)
