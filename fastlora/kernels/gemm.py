"""The heart: a GEMM with the rank-R update inside it, in one accumulator.

    forward   y  =  x  Wᵀ + bias + S  Bᵀ
    dX        dx =  dy W         + keep / (1 - p) * (dS A)

Both are one product, `Y = X W + bias + keep_scaled * (S U)`: forward passes the views W = weight.T and U = lora_B.T,
dX passes X = dy, W = weight, S = dS, U = lora_A. In the kernels below M, N, K are those of this product: for dX, N is
the layer's in_features and K its out_features. The update costs R more columns of K: no second pass over Y or store.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.dropout import Dropout, keep_scale, keep_tile
from fastlora.kernels.gemm_tiles import gemm_tile, tma_holds
from fastlora.kernels.tiles import Target, Tile, input_precision, multiprocessors, padded_rank, rank_block, target_of


@triton.jit
def tile_origin(tile_id, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile; GROUP_M tile rows are walked together, so that their W tiles stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile_id // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tile_id % (GROUP_M * tiles_n)
    return (group * GROUP_M + within % rows) * BLOCK_M, (within // rows) * BLOCK_N


@triton.jit
def add_update(
    acc, s_ptr, u_ptr, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + S U for one tile, float32 [BLOCK_M, BLOCK_N]; U is cast to S's dtype in registers."""
    if BLOCK_R == 16 and RANK_STEPS > 1:  # products without matrix instructions: unrolled, they would spill
        for step in tl.range(0, RANK_STEPS, num_stages=1):
            acc = add_step(
                acc, s_ptr, u_ptr, start_m, start_n, step * BLOCK_R, M, N, R,
                stride_sm, stride_sr, stride_ur, stride_un, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
    else:
        for step in tl.static_range(RANK_STEPS):
            acc = add_step(
                acc, s_ptr, u_ptr, start_m, start_n, step * BLOCK_R, M, N, R,
                stride_sm, stride_sr, stride_ur, stride_un, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
    return acc


@triton.jit
def add_step(
    acc, s_ptr, u_ptr, start_m, start_n, start_r, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
    BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = (start_m + tl.arange(0, acc.shape[0])).to(tl.int64)
    offs_n = (start_n + tl.arange(0, acc.shape[1])).to(tl.int64)
    offs_r = start_r + tl.arange(0, BLOCK_R).to(tl.int64)
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
    u_ptrs = u_ptr + offs_r[:, None] * stride_ur + offs_n[None, :] * stride_un
    s = tl.load(s_ptrs, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R), other=0.0)  # [BLOCK_M, BLOCK_R]
    u = tl.load(u_ptrs, mask=(offs_r[:, None] < R) & (offs_n[None, :] < N), other=0.0)  # [BLOCK_R, BLOCK_N]
    return tl.dot(s, u.to(s.dtype), acc, input_precision=INPUT_PRECISION)


@triton.jit
def dropped_quarter(
    s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """keep / (1 - p) * (S U), float32 [BLOCK_M, BLOCK_N]."""
    update = add_update(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), s_ptr, u_ptr, start_m, start_n, M, N, R,
        stride_sm, stride_sr, stride_ur, stride_un, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    keep = keep_tile(tl.load(seed_ptr), start_m + tl.arange(0, BLOCK_M), start_n, threshold, BLOCK_N)
    return tl.where(keep, update * keep_scale(threshold), 0.0)


@triton.jit
def dropped_half(
    s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """keep / (1 - p) * (S U) for half a tile."""
    left = dropped_quarter(
        s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
        RANK_STEPS, BLOCK_R, INPUT_PRECISION, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    right = dropped_quarter(
        s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n + BLOCK_N // 2, M, N, R,
        stride_sm, stride_sr, stride_ur, stride_un, RANK_STEPS, BLOCK_R, INPUT_PRECISION, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [BLOCK_M, BLOCK_N])


@triton.jit
def dropped_update(
    s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """keep / (1 - p) * (S U) for one tile, float32 [BLOCK_M, BLOCK_N]; by quarters, to spare registers.

    A quarter must hold the eight columns of a Philox call: BLOCK_N is 32 or more.
    """
    left = dropped_half(
        s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
        RANK_STEPS, BLOCK_R, INPUT_PRECISION, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    right = dropped_half(
        s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n + BLOCK_N // 2, M, N, R,
        stride_sm, stride_sr, stride_ur, stride_un, RANK_STEPS, BLOCK_R, INPUT_PRECISION, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [BLOCK_M, BLOCK_N])


@triton.jit(do_not_specialize=["threshold"])
def gemm_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, u_ptr, y_ptr, seed_ptr, threshold, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_bias, stride_sm, stride_sr, stride_ur, stride_un, stride_ym,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, WAIT: tl.constexpr,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program, one tile of Y, through pointers: any strides, any alignment, any GPU."""
    start_m, start_n = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    advance = tl.full((), BLOCK_K, tl.int64)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DROPOUT:  # first, so that the masked update needs no accumulator of its own
        if WAIT:
            gdc_wait()
        acc = dropped_update(
            s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
            RANK_STEPS, BLOCK_R, INPUT_PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for start_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
        else:
            left = K - start_k
            x = tl.load(x_ptrs, mask=mask_m & (offs_k[None, :] < left), other=0.0)
            w = tl.load(w_ptrs, mask=mask_n & (offs_k[:, None] < left), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        x_ptrs += advance * stride_xk
        w_ptrs += advance * stride_wk
    if not DROPOUT:
        if WAIT:
            gdc_wait()  # S comes from the kernel before this one; the K loop needed nothing of it
        acc = add_update(
            acc, s_ptr, u_ptr, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
            RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit(do_not_specialize=["threshold"])
def gemm_tma_kernel(
    x_desc, w_desc, y_desc, bias_ptr, s_ptr, u_ptr, seed_ptr, threshold, M, N, K, R,
    stride_bias, stride_sm, stride_sr, stride_ur, stride_un,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, W_BY_N: tl.constexpr, WAIT: tl.constexpr,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """A persistent grid; X, W and Y move through tensor descriptors, which fill with zeros and clip at the edges."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    if WAIT:
        gdc_wait()
    for tile_id in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        start_m, start_n = tile_origin(tile_id, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if DROPOUT:
            acc = dropped_update(
                s_ptr, u_ptr, seed_ptr, threshold, start_m, start_n, M, N, R,
                stride_sm, stride_sr, stride_ur, stride_un, RANK_STEPS, BLOCK_R, INPUT_PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        for step in range(steps):
            start_k = step * BLOCK_K
            x = x_desc.load([start_m, start_k])
            if W_BY_N:  # the descriptor shows W as (N, K)
                w = w_desc.load([start_n, start_k]).T
            else:
                w = w_desc.load([start_k, start_n])
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        if not DROPOUT:
            acc = add_update(
                acc, s_ptr, u_ptr, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
                RANK_STEPS, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
        if HAS_BIAS:
            offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
            bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        # Two halves share one staging buffer of half the size: room for one more stage of the pipeline.
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        y_desc.store([start_m, start_n], left.to(y_desc.dtype))
        y_desc.store([start_m, start_n + BLOCK_N // 2], right.to(y_desc.dtype))


class Plan(NamedTuple):
    """What one shape and layout need at every launch, decided once."""

    kernel: Any
    grid: tuple[int]
    tile: Tile
    descriptors: tuple[tuple[list[int], list[int], list[int]], ...]  # shape, strides, block of x, w, y; () for pointers
    numbers: tuple[int, ...]
    constants: dict[str, Any]


def _fit_descriptors(dtype: torch.dtype, strides: tuple[int, ...], N: int, addresses: int) -> bool:
    """Whether x (strides[:2]), w (strides[2:4]) and a contiguous y of N columns have rows of whole 16-byte pieces."""
    stride_xm, stride_xk, stride_wk, stride_wn = strides[:4]
    rows = stride_xm | N | (stride_wn if stride_wk == 1 else stride_wk)
    unit = stride_xk == 1 and 1 in (stride_wk, stride_wn) and 0 not in strides[:4]
    return unit and (rows * dtype.itemsize | addresses) % 16 == 0


@lru_cache(maxsize=4096)
def make_plan(
    target: Target, count: int, kind: str, dtype: torch.dtype, M: int, N: int, K: int, R: int,
    strides: tuple[int, ...], addresses: int, has_bias: bool, dropout: bool, precision: str, tile: Tile | None,
) -> Plan:  # fmt: skip
    """The plan on a `target` of `count` multiprocessors; a pure function.

    `strides` are those of x, w, bias, s and u in turn; `addresses` is 0 when x, w and y start at multiples of 16 bytes.
    """
    stride_xm, _, stride_wk, stride_wn = strides[:4]
    fit = _fit_descriptors(dtype, strides, N, addresses)
    w_by_n = stride_wk == 1 and (stride_wn != 1 or N == 1)  # W's rows in memory are those of (N, K)
    w_row = stride_wn if w_by_n else stride_wk
    if tile is None:
        aligned = fit and (stride_xm | N | K | w_row) % 16 == 0
        tile = gemm_tile(
            target, kind, M, N, K, R, dtype, aligned, dropout=dropout, precision=precision,
            tma=fit and target.has_tma and tma_holds(aligned, dropout, R), multiprocessors=count,
        )  # fmt: skip
    elif tile.tma and not fit:
        raise ValueError(f"tma needs rows of whole 16-byte pieces: strides of x and w {strides[:4]}, columns of y {N}")
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    block_r = min(padded_rank(R), rank_block(target, dtype, precision))
    constants = {
        "HAS_BIAS": has_bias, "DROPOUT": dropout, "WAIT": False,
        "RANK_STEPS": triton.cdiv(R, block_r), "BLOCK_R": block_r, "INPUT_PRECISION": precision,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    grid = (min(tiles, count) if tile.persistent else tiles,)
    if not tile.tma:
        constants |= {"EVEN_K": K % block_k == 0, **tile.options}
        return Plan(gemm_kernel, grid, tile, (), (M, N, K, R, *strides, N), constants)
    # One flat loop over tiles and K loads the next tile while this one is stored. Not with dropout, whose update opens
    # a tile: that loop would not be pipelined. Not on sm_100: triton 3.6 fails on its tensor memory there.
    flatten = target.arch == 90 and not dropout
    constants |= {"W_BY_N": w_by_n, "FLATTEN": flatten, **tile.options}
    w_map = ([N, K], [w_row, 1], [block_n, block_k]) if w_by_n else ([K, N], [w_row, 1], [block_k, block_n])
    x_map, y_map = ([M, K], [stride_xm, 1], [block_m, block_k]), ([M, N], [N, 1], [block_m, block_n // 2])
    return Plan(gemm_tma_kernel, grid, tile, (x_map, w_map, y_map), (M, N, K, R, *strides[4:]), constants)


def arguments(plan: Plan, x, w, bias, s, u, y, dropout: Dropout | None) -> tuple:
    """The positional arguments of a launch of `plan.kernel`."""
    seed, threshold = (None, 0) if dropout is None else (dropout.seed, dropout.threshold)
    if not plan.descriptors:
        return (x, w, bias, s, u, y, seed, threshold, *plan.numbers)
    maps = (TensorDescriptor(base, *layout) for base, layout in zip((x, w, y), plan.descriptors, strict=True))
    return (*maps, bias, s, u, seed, threshold, *plan.numbers)


def _gemm(kind, x, w, bias, s, u, dropout, out, tile) -> Tensor:
    """Y (M, N) = x (M, K) w (K, N) + bias (N,) + keep_scaled * (s (M, R) u (R, N))."""
    M, K = x.shape
    R, N = u.shape
    device, dtype = x.device, x.dtype
    target = target_of(device)
    y = torch.empty((M, N), dtype=dtype, device=device) if out is None else out
    strides = (*x.stride(), *w.stride(), 0 if bias is None else bias.stride(0), *s.stride(), *u.stride())
    addresses = (x.data_ptr() | w.data_ptr() | y.data_ptr()) % 16
    precision = input_precision(dtype, target) if dtype == torch.float32 else "ieee"
    plan = make_plan(
        target, multiprocessors(device), kind, dtype, M, N, K, R, strides, addresses,
        bias is not None, dropout is not None, precision, tile,
    )  # fmt: skip
    plan.kernel[plan.grid](*arguments(plan, x, w, bias, s, u, y, dropout), **plan.constants)
    return y


def gemm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    S: Tensor,
    lora_B: Tensor,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + S Bᵀ: x (M, K), weight (N, K), bias (N,) or None, S (M, R), lora_B (N, R) -> y (M, N).

    x, weight and S share a dtype (float16, bfloat16, float32), which y has too; lora_B has it or is float32. Any
    strides; y is contiguous.
    `out`, contiguous (M, N), receives y when given. `tile` overrides the table.
    """
    return _gemm("forward", x, weight.t(), bias, S, lora_B.t(), None, out, tile)


def gemm_dx(
    dy: Tensor,
    weight: Tensor,
    dS: Tensor,
    lora_A: Tensor,
    dropout: Dropout | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """dx = dy W + keep / (1 - p) * (dS A): dy (M, N), weight (N, K), dS (M, R), lora_A (R, K) -> dx (M, K).

    dy, weight and dS share a dtype, which dx has too; lora_A has it or is float32. Any strides; dx is contiguous. The
    mask is the one that forward applied to x, made again from `dropout.seed`.
    """
    return _gemm("dx", dy, weight, None, dS, lora_A, dropout, out, tile)
