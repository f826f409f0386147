"""The kernels of projections that share x: up to three adapters for each read of it.

    forward    Sᵢ = scalingᵢ · dropᵢ(x) Aᵢᵀ                                          one read of x
    backward   dAᵢ = dSᵢᵀ dropᵢ(x)    dx (+)= Σ dropᵢ'(dSᵢ Aᵢ)                       one read of x, dx written once

The loop's body stands once for each adapter: one that is not there is None, and compiled away. Each has its own mask,
made from its own seed: with dropout x is still read once, and the hash is computed for every adapter. Adapters that do
not fit the registers together go in several launches (`chunks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.dropout import Dropout, drop, how, keep_of, keep_signs
from fastlora.kernels.grads import da_launches
from fastlora.kernels.grouped import PROJECTIONS
from fastlora.kernels.grouped import each as _each
from fastlora.kernels.launch import Launch, run
from fastlora.kernels.partials import sum_launches
from fastlora.kernels.product import dot
from fastlora.kernels.s import store_rank
from fastlora.kernels.tiles import Target

RANKS = 64  # of one launch together, each padded; half of it on sm_75; on AMD's each adapter has its own


@triton.jit
def add_down(
    acc, x, a_ptr, seed_ptr, threshold, offs_m, k, end, K,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_R] += drop(x) Aᵀ over the columns of x [BLOCK_M, BLOCK_K]; A (R, K) contiguous."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_r.to(tl.int64)[None, :] * K + (k + offs_k).to(tl.int64)[:, None]  # [BLOCK_K, BLOCK_R]
    a = tl.load(a_ptrs, mask=(offs_r < R)[None, :] & (offs_k < end - k)[:, None], other=0.0)
    if DROPOUT:
        x = drop(x, keep_signs(tl.load(seed_ptr), offs_m, k, threshold, BLOCK_K), DROPOUT)
    return dot(x, a.to(x.dtype), acc, INPUT_PRECISION)


@triton.jit
def store_down(acc, s_ptr, scaling, part, start_m, M, R: tl.constexpr, BLOCK_R: tl.constexpr):
    s = tl.where((tl.arange(0, BLOCK_R) < R)[None, :], acc * scaling, 0.0)  # infinity in x made NaN of the padding
    store_rank(s, s_ptr, part, start_m, M, R)


@triton.jit(do_not_specialize=["threshold"])
def s_shared_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, s0_ptr, s1_ptr, s2_ptr, seed0_ptr, seed1_ptr, seed2_ptr,
    scaling0, scaling1, scaling2, threshold, M, K, stride_xm, stride_xk, split_k,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i * BLOCK_M .. of each s[j], summed over k in j * split_k .. (j + 1) * split_k - 1."""
    start_m = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    start = part * split_k
    end = tl.minimum(start + split_k, K)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    s0 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    s1 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(start, end, BLOCK_K):
        x_ptrs = x_rows + (k + offs_k).to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & (offs_k < end - k)[None, :], other=0.0)
        s0 = add_down(
            s0, x, a0_ptr, seed0_ptr, threshold, offs_m, k, end, K, R0, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION
        )
        if a1_ptr is not None:
            s1 = add_down(
                s1, x, a1_ptr, seed1_ptr, threshold, offs_m, k, end, K, R1, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION
            )
        if a2_ptr is not None:
            s2 = add_down(
                s2, x, a2_ptr, seed2_ptr, threshold, offs_m, k, end, K, R2, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION
            )
    store_down(s0, s0_ptr, scaling0, part, start_m, M, R0, BLOCK_R)
    if a1_ptr is not None:
        store_down(s1, s1_ptr, scaling1, part, start_m, M, R1, BLOCK_R)
    if a2_ptr is not None:
        store_down(s2, s2_ptr, scaling2, part, start_m, M, R2, BLOCK_R)


@triton.jit
def load_a(a_ptr, columns, K, dtype: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """A (R, K), contiguous, at `columns`: [BLOCK_R, BLOCK_K]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    a_ptrs = a_ptr + ranks[:, None] * K + columns.to(tl.int64)[None, :]
    return tl.load(a_ptrs, mask=(ranks < R)[:, None] & (columns < K)[None, :], other=0.0).to(dtype)


@triton.jit
def add_gradients(
    dx, acc, x, a, ds_ptr, da_ptr, dx_ptr, seed_ptr, threshold, offs_m, end, start_k,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [BLOCK_M, BLOCK_K] += drop'(dS A) and acc [BLOCK_R, BLOCK_K] += dSᵀ drop(x); dS (M, R) contiguous."""
    ranks = tl.arange(0, BLOCK_R)
    ds_ptrs = ds_ptr + offs_m.to(tl.int64)[:, None] * R + ranks[None, :]
    ds = tl.load(ds_ptrs, mask=(offs_m < end)[:, None] & (ranks < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
    if DROPOUT:
        signs = keep_signs(tl.load(seed_ptr), offs_m, start_k, threshold, BLOCK_K)
    if dx_ptr is not None:
        if DROPOUT:
            update = dot(ds, a, None, INPUT_PRECISION)
            dx += tl.where(keep_of(signs), update, 0.0)
        else:
            dx = dot(ds, a, dx, INPUT_PRECISION)
    if da_ptr is not None:
        if DROPOUT:
            x = drop(x, signs, DROPOUT)
        acc = dot(tl.trans(ds), x, acc, INPUT_PRECISION)
    return dx, acc


@triton.jit
def store_da(acc, da_ptr, part, columns, K, R: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    da_ptrs = da_ptr + (part.to(tl.int64) * R + ranks)[:, None] * K + columns.to(tl.int64)[None, :]
    tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=(ranks < R)[:, None] & (columns < K)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def da_dx_shared_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, ds0_ptr, ds1_ptr, ds2_ptr, da0_ptr, da1_ptr, da2_ptr, dx_ptr,
    seed0_ptr, seed1_ptr, seed2_ptr, threshold, M, K, stride_xm, stride_xk, split_m,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns i * BLOCK_K .. of rows j * split_m .. (j + 1) * split_m - 1; ADD: to what dx holds."""
    start_k = tl.program_id(0) * BLOCK_K
    part = tl.program_id(1)
    columns = start_k + tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = ds0_ptr.dtype.element_ty
    a0 = load_a(a0_ptr, columns, K, dtype, R0, BLOCK_R)
    a1 = a0
    a2 = a0
    if ds1_ptr is not None:
        a1 = load_a(a1_ptr, columns, K, dtype, R1, BLOCK_R)
    if ds2_ptr is not None:
        a2 = load_a(a2_ptr, columns, K, dtype, R2, BLOCK_R)
    da0 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    da1 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    da2 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    start = part * split_m
    end = tl.minimum(start + split_m, M)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask = (offs_m < end)[:, None] & (columns < K)[None, :]
        dx = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        x = dx
        if x_ptr is not None:
            x_ptrs = x_ptr + rows * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
            x = tl.load(x_ptrs, mask=mask, other=0.0)
        dx, da0 = add_gradients(
            dx, da0, x, a0, ds0_ptr, da0_ptr, dx_ptr, seed0_ptr, threshold, offs_m, end, start_k,
            R0, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
        if ds1_ptr is not None:
            dx, da1 = add_gradients(
                dx, da1, x, a1, ds1_ptr, da1_ptr, dx_ptr, seed1_ptr, threshold, offs_m, end, start_k,
                R1, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION,
            )  # fmt: skip
        if ds2_ptr is not None:
            dx, da2 = add_gradients(
                dx, da2, x, a2, ds2_ptr, da2_ptr, dx_ptr, seed2_ptr, threshold, offs_m, end, start_k,
                R2, BLOCK_K, BLOCK_R, DROPOUT, INPUT_PRECISION,
            )  # fmt: skip
        if dx_ptr is not None:
            dx_ptrs = dx_ptr + rows * K + columns.to(tl.int64)[None, :]
            if ADD:
                dx += tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if da0_ptr is not None:
        store_da(da0, da0_ptr, part, columns, K, R0, BLOCK_R)
    if da1_ptr is not None:
        store_da(da1, da1_ptr, part, columns, K, R1, BLOCK_R)
    if da2_ptr is not None:
        store_da(da2, da2_ptr, part, columns, K, R2, BLOCK_R)


def chunks(ranks: Sequence[int], target: Target) -> list[slice]:
    """Which adapters share a launch: neighbours, at most PROJECTIONS, of RANKS ranks together, all padded alike."""
    found, first, most = [], 0, 1 if target.backend == "hip" else RANKS // 2 if target.family == 75 else RANKS
    for i in range(1, len(ranks) + 1):
        each = tiles.padded_rank(max(ranks[first : i + 1]))
        if i == len(ranks) or i - first == PROJECTIONS or (i + 1 - first) * each > most:
            found.append(slice(first, i))
            first = i
    return found


def s_shared_launches(
    target: Target, x: Tensor, lora_As: Sequence[Tensor], scalings: Sequence[float],
    dropouts: Sequence[Dropout | None], S: Sequence[Tensor],
) -> list[Launch]:  # fmt: skip
    """S (M, R) of each adapter, contiguous."""
    M, K = x.shape
    precision = tiles.input_precision(x.dtype, target)
    launches, sums = [], []
    for chunk in chunks([A.shape[0] for A in lora_As], target):
        As, dropout = lora_As[chunk], dropouts[chunk][0]
        padded = tiles.padded_rank(max(A.shape[0] for A in As))
        tile = _tile("s", target, len(As) * padded, tiles.kind_of(x.dtype, precision))
        splits, split_k = tiles.split_k(target, M, K, tile)
        outs = S[chunk]
        if splits > 1:
            outs = [torch.empty(splits, M, A.shape[0], dtype=torch.float32, device=x.device) for A in As]
            sums += zip(outs, S[chunk], strict=True)
        args = {"x_ptr": x, **_each("a{}_ptr", As), **_each("s{}_ptr", outs)}
        args |= _each("seed{}_ptr", [d and d.seed for d in dropouts[chunk]])
        args |= _each("scaling{}", [float(s) for s in scalings[chunk]])
        args |= {
            "threshold": dropout.threshold if dropout else 0, "M": M, "K": K,
            "stride_xm": x.stride(0), "stride_xk": x.stride(1), "split_k": split_k,
            **_each("R{}", [A.shape[0] for A in As]),
            "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": padded,
            "DROPOUT": how(target, x.dtype, dropout), "INPUT_PRECISION": precision,
        }  # fmt: skip
        launches.append(Launch(s_shared_kernel, (triton.cdiv(M, tile.block_m), splits), args, tile.options))
    return launches + sum_launches(*sums)


def da_dx_shared_launches(
    target: Target, dSs: Sequence[Tensor], x: Tensor | None, lora_As: Sequence[Tensor],
    dropouts: Sequence[Dropout | None], dAs: Sequence[Tensor | None], dx: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """dA (R, K) of each adapter and dx (M, K), their sum through the adapters, all contiguous; None: not wanted."""
    M, K = dSs[0].shape[0], lora_As[0].shape[1]
    precision = tiles.input_precision(dSs[0].dtype, target)
    launches, sums, add = [], [], False
    for chunk in chunks([A.shape[0] for A in lora_As], target):
        As, dropout, wanted = lora_As[chunk], dropouts[chunk][0], list(dAs[chunk])
        padded = tiles.padded_rank(max(A.shape[0] for A in As))
        if padded > tiles.RANK_WIDE and dx is not None:  # dA and a tile of A together do not fit: a kernel for each
            for i, dA in enumerate(wanted):
                if dA is not None:
                    launches += da_launches(target, dSs[chunk][i], x, dropouts[chunk][i], dA)
                    wanted[i] = None
        if dx is None and not any(dA is not None for dA in wanted):
            continue
        tile = _tile("da", target, len(As) * padded, tiles.kind_of(dSs[0].dtype, precision), len(As) == 1)
        reads = any(dA is not None for dA in wanted)
        splits, split_m = tiles.split_m(target, M, K, tile) if reads else (triton.cdiv(M, tile.block_m), tile.block_m)
        outs = wanted
        if splits > 1:
            outs = [None if d is None else d.new_empty(splits, d.numel(), dtype=torch.float32) for d in wanted]
            sums += [(part, d) for part, d in zip(outs, wanted, strict=True) if d is not None]
        args = {"x_ptr": x if reads else None, **_each("a{}_ptr", As), **_each("ds{}_ptr", dSs[chunk])}
        args |= _each("da{}_ptr", outs) | {"dx_ptr": dx} | _each("seed{}_ptr", [d and d.seed for d in dropouts[chunk]])
        args |= {
            "threshold": dropout.threshold if dropout else 0, "M": M, "K": K,
            "stride_xm": x.stride(0) if reads else 0, "stride_xk": x.stride(1) if reads else 0, "split_m": split_m,
            **_each("R{}", [A.shape[0] for A in As]),
            "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": padded,
            "ADD": add, "DROPOUT": how(target, dSs[0].dtype, dropout), "INPUT_PRECISION": precision,
        }  # fmt: skip
        launches.append(Launch(da_dx_shared_kernel, (triton.cdiv(K, tile.block_k), splits), args, tile.options))
        add = True
    return launches + sum_launches(*sums)


def _tile(kernel: str, target: Target, R: int, kind: str, alone: bool = False) -> tiles.Tile:
    """That of the kernel of one adapter, with what keeps it in registers; `da`'s is smaller, for dx is beside it."""
    turing = target.family == 75
    tile = tiles.rank_tiles(kernel, target, R, kind)[-1 if turing else 0]
    if kernel == "da":
        wide = kind == "half" and target.backend != "hip"
        rows, columns = min(32, tile.block_m), min(64 if wide else 32, tile.block_k)
        few = kind == "half" and (turing or (R == RANKS and alone))
        warps, stages = 4 if few else 8, min(2, tile.num_stages) if kind == "tf32" else tile.num_stages
        return replace(tile, block_m=rows, block_k=columns, num_warps=warps, num_stages=stages)
    return tile if kind == "ieee" else replace(tile, num_warps=4)


def s_shared(
    x: Tensor, lora_As: Sequence[Tensor], scalings: Sequence[float], dropouts: Sequence[Dropout | None]
) -> list[Tensor]:
    """S = scaling * drop(x) @ lora_A.T of each adapter.

    Args:
        x: (M, K), float16, bfloat16 or float32, any strides.
        lora_As: (R, K) each, x's dtype or float32, contiguous; R from 1 to 128.
        scalings: numbers; dropout's factor 1 / (1 - p) is in them, and so in S and in the dS of backward.
        dropouts: of one probability, each with its own seed; None for none.

    Returns:
        (M, R) each, x's dtype, contiguous.
    """
    S = [torch.empty(x.shape[0], A.shape[0], dtype=x.dtype, device=x.device) for A in lora_As]
    run(s_shared_launches(tiles.target_of(x.device), x, lora_As, scalings, dropouts, S))
    return S


def da_dx_shared(
    dSs: Sequence[Tensor], x: Tensor | None, lora_As: Sequence[Tensor], dropouts: Sequence[Dropout | None],
    need_A: Sequence[bool], dx_out: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """dA = dS.T @ drop(x) of each adapter, returned, and the sum of drop'(dS @ lora_A), written into `dx_out`.

    Args:
        dSs: (M, R) each, x's dtype, contiguous.
        x, lora_As, dropouts: as forward had them; x may be None where no dA is wanted.
        need_A: whether dA is wanted, for each.
        dx_out: (M, K), contiguous; None when it is not wanted.

    Returns:
        dA (R, K) each in lora_A's dtype, contiguous, or None.
    """
    dAs = [torch.empty_like(A) if need else None for A, need in zip(lora_As, need_A, strict=True)]
    run(da_dx_shared_launches(tiles.target_of(dSs[0].device), dSs, x, lora_As, dropouts, dAs, dx_out))
    return dAs
