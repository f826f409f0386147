"""The kernels of path `hybrid`, where ATen multiplies by W: what the rank adds is written first, the GEMM adds to it.

    forward    S = scaling · drop(x) Aᵀ       y  = S Bᵀ + bias        one read of x;  ATen then adds x Wᵀ to y
    backward   dA = dSᵀ drop(x)               dx = drop'(dS A)        one read of x;  ATen then adds dy W to dx

(dS with dB is `grads.ds_db`.) Floors at the copy bandwidth: (M * K + M * N) * itemsize bytes forward, 2 * M * K *
itemsize backward. The mask is made once for both results. Where M gives too few programs forward, K is split into
float32 partials of S, and the programs of a second kernel, one for each tile of y, add those of their rows again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.bank import is_bank, threshold_of
from fastlora.kernels.dropout import Dropout, arguments, drop, how, keep_of, keep_signs
from fastlora.kernels.grads import da_launches
from fastlora.kernels.launch import Launch, run
from fastlora.kernels.partials import sum_launch
from fastlora.kernels.product import rounded
from fastlora.kernels.s import down, s_launches, store_rank
from fastlora.kernels.tiles import Target, Tile

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank


@triton.jit
def store_y(
    s, b_ptr, bias_ptr, y_ptr, start_m, start_n, M, N, stride_bn, stride_br, stride_bias, stride_ym,
    R: tl.constexpr, BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y = s Bᵀ + bias, s [BLOCK_M, BLOCK_R] rounded."""
    rows = (start_m + tl.arange(0, s.shape[0])).to(tl.int64)
    columns = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_r = tl.arange(0, s.shape[1]).to(tl.int64)
    mask_n = columns < N
    b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r[:, None] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[None, :] & (offs_r[:, None] < R), other=0.0)  # [BLOCK_R, BLOCK_N]
    y = tl.dot(s, rounded(b.to(s.dtype), INPUT_PRECISION), input_precision=INPUT_PRECISION)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["threshold"])
def s_y_kernel(
    x_ptr, a_ptr, b_ptr, bias_ptr, s_ptr, y_ptr, rows_ptr, seed_ptr, scaling, threshold, M, N, K,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bn, stride_br, stride_bias, stride_ym,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows: their S, then their y."""
    start_m = tl.program_id(0) * BLOCK_M
    s = down(
        x_ptr, a_ptr, rows_ptr, seed_ptr, scaling, threshold, start_m, 0, K, M,
        stride_xm, stride_xk, stride_ar, stride_ak,
        R, BLOCK_M, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION,
    )  # fmt: skip
    s = s.to(s_ptr.dtype.element_ty)  # as backward will see it
    store_rank(s, s_ptr, tl.program_id(1), start_m, M, R)
    s = rounded(s, INPUT_PRECISION)
    for start_n in range(0, N, BLOCK_N):
        store_y(
            s, b_ptr, bias_ptr, y_ptr, start_m, start_n, M, N, stride_bn, stride_br, stride_bias, stride_ym,
            R, BLOCK_N, INPUT_PRECISION,
        )  # fmt: skip


@triton.jit
def y_kernel(
    s_ptr, partials_ptr, b_ptr, bias_ptr, y_ptr, P, M, N, stride_bn, stride_br, stride_bias, stride_ym,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile (i, j) of y from the P partials of S, added in order; those of j = 0 write S."""
    start_m = tl.program_id(0) * BLOCK_M
    rows = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (rows[:, None] < M) & (offs_r[None, :] < R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for part in range(P):
        ptrs = partials_ptr + (tl.cast(part, tl.int64) * M + rows)[:, None] * R + offs_r[None, :]
        acc += tl.load(ptrs, mask=mask, other=0.0)
    s = acc.to(s_ptr.dtype.element_ty)
    if tl.program_id(1) == 0:
        store_rank(s, s_ptr, tl.program_id(1), start_m, M, R)
    store_y(
        rounded(s, INPUT_PRECISION), b_ptr, bias_ptr, y_ptr, start_m, tl.program_id(1) * BLOCK_N, M, N,
        stride_bn, stride_br, stride_bias, stride_ym, R, BLOCK_N, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def da_dx_kernel(
    x_ptr, ds_ptr, a_ptr, da_ptr, dx_ptr, rows_ptr, seed_ptr, threshold, M, K,
    stride_xm, stride_xk, stride_sm, stride_sr, stride_ar, stride_ak, stride_dm, split_m,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns i * BLOCK_K .. of rows j * split_m .. (j + 1) * split_m - 1; without da_ptr no x."""
    start_k = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = (offs_k < K)[None, :]
    mask_r = offs_r < R
    columns = offs_k.to(tl.int64)
    ranks = offs_r.to(tl.int64)
    a_ptrs = a_ptr + ranks[:, None] * stride_ar + columns[None, :] * stride_ak
    a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k, other=0.0).to(ds_ptr.dtype.element_ty)  # [BLOCK_R, BLOCK_K]
    a = rounded(a, INPUT_PRECISION)
    start = split * split_m
    end = tl.minimum(start + split_m, M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        rows = offs_m.to(tl.int64)
        ds_ptrs = ds_ptr + rows[:, None] * stride_sm + ranks[None, :] * stride_sr
        ds = tl.load(ds_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        ds = rounded(ds, INPUT_PRECISION)
        dx = tl.dot(ds, a, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_K]
        if DROPOUT:
            signs = keep_signs(seed, offs_m, start_k, threshold_of(threshold, rows_ptr, offs_m, end), BLOCK_K)
            dx = tl.where(keep_of(signs), dx, 0.0)
        if da_ptr is not None:
            x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk
            x = rounded(tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0), INPUT_PRECISION)
            if DROPOUT:
                x = drop(x, signs, DROPOUT)
            acc = tl.dot(tl.trans(ds), x, acc, input_precision=INPUT_PRECISION)
        dx_ptrs = dx_ptr + rows[:, None] * stride_dm + columns[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k)
    if da_ptr is not None:
        da_ptrs = da_ptr + (split.to(tl.int64) * R + ranks)[:, None] * K + columns[None, :]
        tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_k)


def s_y_launches(
    target: Target, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Bank,
    dropout: Dropout | None, S: Tensor, y: Tensor, tile: Tile | None = None,
) -> list[Launch]:  # fmt: skip
    """S (M, R), contiguous, and y (M, N), whose rows lie side by side."""
    M, K = x.shape
    N, R = lora_B.shape
    precision = tiles.input_precision(x.dtype, target)
    tile = tile or tiles.rank_tiles("s_y", target, R, tiles.kind_of(x.dtype, precision), is_bank(scaling))[0]
    splits, _ = tiles.split_k(target, M, K, tile)
    tail = {
        "stride_bn": lora_B.stride(0), "stride_br": lora_B.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0), "stride_ym": y.stride(0),
        "R": R, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    padded = tiles.padded_rank(R)
    if splits > 1:
        first = s_launches(target, x, lora_A, scaling, dropout, S, tile)[0]
        out = first.args["out_ptr"]
        args = {
            "s_ptr": S, "partials_ptr": out, "b_ptr": lora_B, "bias_ptr": bias, "y_ptr": y, "P": splits, "M": M, "N": N,
        } | tail  # fmt: skip
        args |= {"BLOCK_R": padded, "INPUT_PRECISION": precision}
        return [
            first,
            Launch(y_kernel, (triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n)), args, tile.options),
        ]
    args = {
        "x_ptr": x, "a_ptr": lora_A, "b_ptr": lora_B, "bias_ptr": bias, "s_ptr": S, "y_ptr": y,
        **arguments(dropout, scaling), "M": M, "N": N, "K": K,
        "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_ar": lora_A.stride(0),
        "stride_ak": lora_A.stride(1),
    } | tail  # fmt: skip
    args |= {
        "BLOCK_K": tile.block_k, "BLOCK_R": padded,
        "DROPOUT": how(target, x.dtype, dropout), "INPUT_PRECISION": precision,
    }  # fmt: skip
    return [Launch(s_y_kernel, (triton.cdiv(M, tile.block_m),), args, tile.options)]


def da_dx_launches(
    target: Target, dS: Tensor, x: Tensor | None, lora_A: Tensor, dropout: Dropout | None, dA: Tensor | None,
    dx: Tensor | None, tile: Tile | None = None,
) -> list[Launch]:  # fmt: skip
    """dA (R, K), contiguous, and dx (M, K), whose rows lie side by side; None for what is not wanted."""
    M, R = dS.shape
    K = lora_A.shape[1]
    if dx is None:
        return da_launches(target, dS, x, dropout, dA)
    precision = tiles.input_precision(dS.dtype, target)
    tile = tile or tiles.rank_tiles("da_dx", target, R, tiles.kind_of(dS.dtype, precision))[0]
    if (
        dA is not None and R > tiles.RANK_WIDE
    ):  # dA and a tile of A together do not fit the registers: a kernel for each
        return da_launches(target, dS, x, dropout, dA) + da_dx_launches(
            target, dS, None, lora_A, dropout, None, dx, tile
        )
    splits, split_m = (triton.cdiv(M, tile.block_m), tile.block_m) if dA is None else tiles.split_m(target, M, K, tile)
    partials = dA if splits == 1 or dA is None else torch.empty(splits, R * K, dtype=torch.float32, device=dx.device)
    stride_xm, stride_xk = (0, 0) if dA is None else x.stride()
    args = {
        "x_ptr": None if dA is None else x, "ds_ptr": dS, "a_ptr": lora_A, "da_ptr": partials, "dx_ptr": dx,
        **arguments(dropout), "M": M, "K": K,
        "stride_xm": stride_xm, "stride_xk": stride_xk, "stride_sm": dS.stride(0), "stride_sr": dS.stride(1),
        "stride_ar": lora_A.stride(0), "stride_ak": lora_A.stride(1), "stride_dm": dx.stride(0), "split_m": split_m,
        "R": R, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": tiles.padded_rank(R),
        "DROPOUT": how(target, dS.dtype, dropout), "INPUT_PRECISION": precision,
    }  # fmt: skip
    first = Launch(da_dx_kernel, (triton.cdiv(K, tile.block_k), splits), args, tile.options)
    return [first] if partials is dA else [first, sum_launch(partials, dA)]


def s_y(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Bank, dropout: Dropout | None,
    out: Tensor, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """S = scaling * drop(x) @ lora_A.T, returned, and S @ lora_B.T + bias, written into `out`; float32 accumulation.

    Args:
        x: (M, K), float16, bfloat16 or float32, any strides.
        lora_A: (R, K), x's dtype or float32, any strides; R from 1 to 256.
        lora_B: (N, R), likewise.
        bias: (N,) or None.
        scaling: dropout's factor 1 / (1 - p) is in it; or the bank that knows it for each row.
        dropout: None for none.
        out: (M, N), x's dtype, columns side by side.
        tile: instead of the table's.

    Returns:
        S (M, R), x's dtype, contiguous.
    """
    S = torch.empty(x.shape[0], lora_A.shape[0], dtype=x.dtype, device=x.device)
    run(s_y_launches(tiles.target_of(x.device), x, lora_A, lora_B, bias, scaling, dropout, S, out, tile))
    return S


def da_dx(
    dS: Tensor, x: Tensor | None, lora_A: Tensor, dropout: Dropout | None, dA_dtype: torch.dtype | None,
    dx_out: Tensor | None, tile: Tile | None = None,
) -> Tensor | None:  # fmt: skip
    """dA = dS.T @ drop(x), returned, and drop'(dS @ lora_A), written into `dx_out`; float32 accumulation.

    Args:
        dS: (M, R), x's dtype, any strides; R from 1 to 256.
        x: (M, K), float16, bfloat16 or float32, any strides; None will do when dA is not wanted.
        lora_A: (R, K), dS's dtype or float32, any strides.
        dropout: what the forward pass used; None for none.
        dA_dtype: of the result, lora_A's; None when dA is not wanted.
        dx_out: (M, K), dS's dtype, columns side by side; None when it is not wanted.
        tile: instead of the table's.

    Returns:
        dA (R, K), contiguous, or None.
    """
    dA = None if dA_dtype is None else torch.empty(lora_A.shape, dtype=dA_dtype, device=dS.device)
    if dA is not None or dx_out is not None:
        run(da_dx_launches(tiles.target_of(dS.device), dS, x, lora_A, dropout, dA, dx_out, tile))
    return dA
