"""The small gradients.

    dS = scaling * dY B   (M, R)        dB = dYᵀ S   (N, R)        dA = dSᵀ drop(X)   (R, K)

`ds_db` reads dY once for two sums that run in different directions, over N for dS and over M for dB, without atomics.
A program owns a region of region_m rows and BLOCK_N columns and walks down its rows, BLOCK_M at a time: its dB
[BLOCK_N, R] stays in registers to the end, each step's dS [BLOCK_M, R] is finished for the region and stored. Where
one region spans all columns (or all rows) that is the result; otherwise it is a float32 partial, and a second kernel
adds the partials of both in order. With P_n = cdiv(N, BLOCK_N) and P_m = cdiv(M, region_m) the partials cost, each
written once and read once,

    2 * 4 * R * (P_n * M + P_m * N) bytes

beside the M * N * itemsize of dY: for M = 8192, N = 4096, R = 16 in bfloat16 and regions of 640 x 256, 2 * 12 MB
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

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.bank import is_bank, scale, scaled, threshold_of
from fastlora.kernels.dropout import Dropout, arguments, bits_of, drop, how, keep_signs
from fastlora.kernels.launch import Launch, run
from fastlora.kernels.partials import sum_launches
from fastlora.kernels.product import dot
from fastlora.kernels.s import s_launches
from fastlora.kernels.tiles import Target, Tile

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank


@triton.jit
def walk(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, rows_ptr, scaling, part_n, part_m, M, N,
    stride_ym, stride_yn, stride_bn, stride_br, region_m, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns part_n * BLOCK_N .. and rows part_m * region_m ..; writes dS partial part_n and dB partial part_m."""
    offs_n = part_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    columns = offs_n.to(tl.int64)
    b_ptrs = b_ptr + columns[:, None] * stride_bn + offs_r[None, :] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    b = b.to(dy_ptr.dtype.element_ty)
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
        db = dot(tl.trans(dy), s, db, INPUT_PRECISION)
        ds = scaled(dot(dy, b, None, INPUT_PRECISION), scaling, rows_ptr, offs_m, end, R)
        ds_ptrs = ds_ptr + (part_n.to(tl.int64) * M + rows)[:, None] * R + offs_r[None, :]
        tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask_mr)
    db_ptrs = db_ptr + (part_m.to(tl.int64) * N + offs_n)[:, None] * R + offs_r[None, :]
    tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def ds_db_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, rows_ptr, scaling, M, N,
    stride_ym, stride_yn, stride_bn, stride_br, region_m,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns i * BLOCK_N .. and rows j * region_m ..; writes dS partial i and dB partial j."""
    walk(
        dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, rows_ptr, scaling, tl.program_id(0), tl.program_id(1), M, N,
        stride_ym, stride_yn, stride_bn, stride_br, region_m, R, BLOCK_M, BLOCK_N, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def da_kernel(
    x_ptr, ds_ptr, da_ptr, bits_ptr, rows_ptr, seed_ptr, threshold, M, K,
    stride_sm, stride_sr, stride_xm, stride_xk, split_m, stride_dr, stride_dk,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
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
            signs = keep_signs(seed, offs_m, start_k, threshold_of(threshold, rows_ptr, offs_m, end), BLOCK_K)
            x = drop(x, signs, DROPOUT)
            if BITS:
                offs_b = (start_k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.int64)
                bytes_k = tl.cdiv(K, 8)
                bits_ptrs = bits_ptr + rows[:, None] * bytes_k + offs_b[None, :]
                tl.store(bits_ptrs, bits_of(signs), mask=mask_m[:, None] & (offs_b < bytes_k)[None, :])
        acc = dot(ds, x, acc, INPUT_PRECISION)
    da_ptrs = da_ptr + split.to(tl.int64) * (R * K) + offs_r[:, None] * stride_dr + columns[None, :] * stride_dk
    tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=mask_r & mask_k)


def ds_db_launches(
    target: Target, dy: Tensor, lora_B: Tensor, S: Tensor, scaling: float | Bank, dS: Tensor, dB: Tensor,
    tile: Tile | None = None,
) -> list[Launch]:  # fmt: skip
    """dS (M, R) and dB (N, R), contiguous. Two reads of dy where the partials of one would move more bytes."""
    M, N = dy.shape
    R = lora_B.shape[1]
    precision = tiles.input_precision(dy.dtype, target)
    if tile is None:
        tile = tiles.ds_db_tile(target, M, N, R, tiles.kind_of(dy.dtype, precision), dy.dtype.itemsize)
    if tile is None:
        down = s_launches(target, dy, lora_B.t(), scaling, None, dS)
        return down + da_launches(target, S, dy, None, dB.t())
    parts_n = triton.cdiv(N, tile.block_n)
    parts_m, region_m = tiles.regions(target, M, tile, parts_n)
    ds = dS if parts_n == 1 else torch.empty(parts_n, M, R, dtype=torch.float32, device=dy.device)
    db = dB if parts_m == 1 else torch.empty(parts_m, N, R, dtype=torch.float32, device=dy.device)
    args = {
        "dy_ptr": dy, "b_ptr": lora_B, "s_ptr": S, "ds_ptr": ds, "db_ptr": db, **scale(scaling),
        "M": M, "N": N, "stride_ym": dy.stride(0), "stride_yn": dy.stride(1), "stride_bn": lora_B.stride(0),
        "stride_br": lora_B.stride(1), "region_m": region_m,
        "R": R, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": tiles.padded_rank(R),
        "INPUT_PRECISION": precision,
    }  # fmt: skip
    sums = [(ds, dS)] * (parts_n > 1) + [(db, dB)] * (parts_m > 1)
    return [Launch(ds_db_kernel, (parts_n, parts_m), args, tile.options), *sum_launches(*sums)]


def da_launches(
    target: Target, dS: Tensor, x: Tensor, dropout: Dropout | None, dA: Tensor, tile: Tile | None = None,
    bits: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """dA (R, K), contiguous or the transpose of a contiguous (K, R)."""
    M, K = x.shape
    R = dS.shape[1]
    precision = tiles.input_precision(x.dtype, target)
    tile = (
        tile
        or tiles.rank_tiles("da", target, R, tiles.kind_of(x.dtype, precision), bool(dropout) and is_bank(dropout.p))[0]
    )
    splits, split_m = tiles.split_m(target, M, K, tile)
    partials = dA if splits == 1 else torch.empty(splits, R * K, dtype=torch.float32, device=x.device)
    args = {
        "x_ptr": x, "ds_ptr": dS, "da_ptr": partials, "bits_ptr": bits, **arguments(dropout), "M": M, "K": K,
        "stride_sm": dS.stride(0), "stride_sr": dS.stride(1), "stride_xm": x.stride(0), "stride_xk": x.stride(1),
        "split_m": split_m, "stride_dr": dA.stride(0), "stride_dk": dA.stride(1),
        "R": R, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": tiles.padded_rank(R),
        "DROPOUT": how(target, x.dtype, dropout), "BITS": bits is not None, "INPUT_PRECISION": precision,
    }  # fmt: skip
    first = Launch(da_kernel, (triton.cdiv(K, tile.block_k), splits), args, tile.options)
    return [first, *sum_launches(*[(partials, dA)] * (splits > 1))]


def ds_db(
    dy: Tensor, lora_B: Tensor, S: Tensor, scaling: float | Bank, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """dS = scaling * dy @ lora_B and dB = dy.T @ S, accumulated in float32, from one read of dy (two from R = 64 on).

    Args:
        dy: (M, N), float16, bfloat16 or float32, any strides.
        lora_B: (N, R), dy's dtype or float32, any strides; R from 1 to 256.
        S: (M, R), dy's dtype, contiguous; it holds `scaling` already.
        scaling: dropout's factor 1 / (1 - p) is in it; or the bank that knows it for each row.
        tile: instead of the table's.

    Returns:
        dS (M, R) in dy's dtype and dB (N, R) in lora_B's, both contiguous.
    """
    dS = torch.empty(S.shape, dtype=dy.dtype, device=dy.device)
    dB = torch.empty(lora_B.shape, dtype=lora_B.dtype, device=dy.device)
    run(ds_db_launches(tiles.target_of(dy.device), dy, lora_B, S, scaling, dS, dB, tile))
    return dS, dB


def da(
    dS: Tensor, x: Tensor, dropout: Dropout | None, dtype: torch.dtype, tile: Tile | None = None,
    bits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dA = dS.T @ drop(x), accumulated in float32.

    Args:
        dS: (M, R), x's dtype, any strides; R from 1 to 256.
        x: (M, K), float16, bfloat16 or float32, any strides.
        dropout: what the forward pass used; None for none.
        dtype: of the result, lora_A's.
        tile: instead of the table's.
        bits: with dropout, `dropout.mask_bits(M, K)`, which receives the mask for dX.

    Returns:
        (R, K), `dtype`, contiguous.
    """
    dA = torch.empty(dS.shape[1], x.shape[1], dtype=dtype, device=x.device)
    run(da_launches(tiles.target_of(x.device), dS, x, dropout, dA, tile, bits))
    return dA
