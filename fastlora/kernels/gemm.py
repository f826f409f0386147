"""The heart: a GEMM with the rank-R update inside it, in one accumulator.

    forward   y  =  x  Wᵀ + bias + S  Bᵀ
    dX        dx =  dy W         + keep * (dS A)

Both are one product, `Y = X W + bias + keep * (S U)`: forward passes the views W = weight.T and U = lora_B.T,
dX passes X = dy, W = weight, S = dS, U = lora_A. In the kernels below M, N, K are those of this product: for dX, N is
the layer's in_features and K its out_features. The update costs R more columns of K: no second pass over Y or store.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import tiles
from fastlora.kernels.dropout import STORED
from fastlora.kernels.launch import Launch
from fastlora.kernels.product import dot
from fastlora.kernels.tiles import Target, Tile


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
    # products without matrix instructions, and those of many steps: unrolled, they would spill
    if (BLOCK_R == 16 and RANK_STEPS > 1) or RANK_STEPS > 4:
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
    return dot(s, u.to(s.dtype), acc, INPUT_PRECISION)


@triton.jit
def halves(t):
    """Left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(t, [t.shape[0], 2, t.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def add_rest(
    acc, start_m, start_n, bias_ptr, stride_bias, update, bits_ptr, M, N, R,
    DROPOUT: tl.constexpr, RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + bias and, with dropout, + keep * (S U): by quarters of a tile, to spare registers."""
    if DROPOUT:
        s_ptr, u_ptr, stride_sm, stride_sr, stride_ur, stride_un = update
        dropped = add_update(
            tl.zeros_like(acc), s_ptr, u_ptr, start_m, start_n, M, N, R,
            stride_sm, stride_sr, stride_ur, stride_un, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
        offs_m = start_m + tl.arange(0, acc.shape[0])
        offs_b = (start_n // 8 + tl.arange(0, acc.shape[1] // 8)).to(tl.int64)
        bytes_n = tl.cdiv(N, 8)
        bits_ptrs = bits_ptr + offs_m.to(tl.int64)[:, None] * bytes_n + offs_b[None, :]
        bits = tl.load(bits_ptrs, mask=(offs_m < M)[:, None] & (offs_b < bytes_n)[None, :], other=0)
        keep = tl.reshape((bits[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1, acc.shape) != 0
        acc += tl.where(keep, dropped, 0.0)
    if bias_ptr is not None:
        offs_n = (start_n + tl.arange(0, acc.shape[1])).to(tl.int64)
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def store_part(part, y_ptr, start_m, start_n, M, N, stride_ym):
    offs_m = (start_m + tl.arange(0, part.shape[0])).to(tl.int64)
    offs_n = (start_n + tl.arange(0, part.shape[1])).to(tl.int64)
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, part.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def add_product(
    acc, x_ptr, w_ptr, start_m, start_n, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + X W for one tile, float32 [BLOCK_M, BLOCK_N]."""
    offs_m = (start_m + tl.arange(0, acc.shape[0])).to(tl.int64)
    offs_n = (start_n + tl.arange(0, acc.shape[1])).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    advance = tl.full((), BLOCK_K, tl.int64)
    for start_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
        else:
            left = K - start_k
            x = tl.load(x_ptrs, mask=mask_m & (offs_k[None, :] < left), other=0.0)
            w = tl.load(w_ptrs, mask=mask_n & (offs_k[:, None] < left), other=0.0)
        acc = dot(x, w, acc, INPUT_PRECISION)
        x_ptrs += advance * stride_xk
        w_ptrs += advance * stride_wk
    return acc


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, s_ptr, u_ptr, bits_ptr, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_bias, stride_sm, stride_sr, stride_ur, stride_un,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program, one tile of Y, through pointers: any strides, any alignment, any GPU."""
    start_m, start_n = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = add_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x_ptr, w_ptr, start_m, start_n, M, N, K,
        stride_xm, stride_xk, stride_wk, stride_wn, EVEN_K, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip
    update = (s_ptr, u_ptr, stride_sm, stride_sr, stride_ur, stride_un)
    if DROPOUT:
        left, right = halves(acc)
        for half in tl.static_range(2):
            first, second = halves(left if half == 0 else right)
            for quarter in tl.static_range(2):
                part_n = start_n + (2 * half + quarter) * (BLOCK_N // 4)
                part = add_rest(
                    first if quarter == 0 else second, start_m, part_n, bias_ptr, stride_bias, update, bits_ptr,
                    M, N, R, DROPOUT, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
                )  # fmt: skip
                store_part(part, y_ptr, start_m, part_n, M, N, stride_ym)
    else:
        acc = add_update(
            acc, s_ptr, u_ptr, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
            RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
        acc = add_rest(
            acc, start_m, start_n, bias_ptr, stride_bias, update, bits_ptr, M, N, R,
            DROPOUT, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
        store_part(acc, y_ptr, start_m, start_n, M, N, stride_ym)


@triton.jit
def gemm_tma_kernel(
    x_desc, w_desc, y_desc, bias_ptr, s_ptr, u_ptr, bits_ptr, M, N, K, R,
    stride_bias, stride_sm, stride_sr, stride_ur, stride_un,
    DROPOUT: tl.constexpr, W_BY_N: tl.constexpr, FLATTEN: tl.constexpr,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A persistent grid; X, W and Y move through tensor descriptors, which fill with zeros and clip at the edges.

    One flat loop over tiles and K loads the next tile while this one is stored. Y leaves in quarters: a staging buffer
    of a quarter of its size leaves room for one more stage of the pipeline.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    update = (s_ptr, u_ptr, stride_sm, stride_sr, stride_ur, stride_un)
    for tile_id in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        start_m, start_n = tile_origin(tile_id, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            start_k = step * BLOCK_K
            x = x_desc.load([start_m, start_k])
            if W_BY_N:  # the descriptor shows W as (N, K)
                w = w_desc.load([start_n, start_k]).T
            else:
                w = w_desc.load([start_k, start_n])
            acc = dot(x, w, acc, INPUT_PRECISION)
        if not DROPOUT:
            acc = add_update(
                acc, s_ptr, u_ptr, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
                RANK_STEPS, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
        left, right = halves(acc)
        for half in tl.static_range(2):
            first, second = halves(left if half == 0 else right)
            for quarter in tl.static_range(2):
                part_n = start_n + (2 * half + quarter) * (BLOCK_N // 4)
                part = add_rest(
                    first if quarter == 0 else second, start_m, part_n, bias_ptr, stride_bias, update, bits_ptr,
                    M, N, R, DROPOUT, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
                )  # fmt: skip
                y_desc.store([start_m, part_n], part.to(y_desc.dtype))


def shown(t: Tensor) -> bool:
    """Whether a descriptor can show t: its rows are whole 16-byte pieces, each apart."""
    return t.stride(1) == 1 and t.stride(0) >= t.shape[1] and (t.stride(0) * t.itemsize | t.data_ptr()) % 16 == 0


def descriptors_fit(x: Tensor, w: Tensor, y: Tensor) -> bool:
    """Whether descriptors can show x (M, K), w (K, N), either way round, and y (M, N)."""
    return shown(x) and shown(w if w.stride(1) == 1 else w.t()) and shown(y)


@cache
def _specialised():
    """`gemm_ws`, or None where triton has not the names that it is written in."""
    try:
        from fastlora.kernels import gemm_ws
    except Exception:  # Gluon is experimental, and raises what it likes
        return None
    return gemm_ws


def specialised(target: Target, x: Tensor, w: Tensor, u: Tensor) -> tuple[Tile, ...]:
    """The tile of `gemm_ws` where that takes x (M, K), w (K, N) and u (R, N), of which descriptors can show x and w."""
    usable = target.arch == 90 and _specialised() is not None and _specialised().takes(x, w, u)
    return (tiles.WARP_SPECIALISED,) if usable else ()


def rows_by_n(w: Tensor) -> bool:
    """Whether the rows of w (K, N) in memory are those of (N, K)."""
    return w.stride(0) == 1 and (w.stride(1) != 1 or w.shape[1] == 1)


def candidates(target: Target, x: Tensor, w: Tensor, u: Tensor, dropout: bool, y: Tensor) -> tuple[Tile, ...]:
    """At most three tiles for y (M, N) = x (M, K) w (K, N) and an update by u (R, N), the default first.

    Where `gemm_ws` can run its tile stands before the same cut of the other kernel: 360 us for 423 (8192 x 4096 x 4096
    in bfloat16 on an H100, where ATen's product alone takes 351).
    """
    (M, K), (R, N) = x.shape, u.shape
    kind = tiles.kind_of(x.dtype, tiles.input_precision(x.dtype, target))
    fit = descriptors_fit(x, w, y)
    aligned = fit and (x.stride(0) | N | K | w.stride(1 if rows_by_n(w) else 0)) % 16 == 0
    found = tiles.gemm_tiles(target, M, N, R, kind, aligned, dropout, fit, tiles.multiprocessors(x.device, target))
    both = [
        (*specialised(target, x, w, u), tile) if replace(tile, ws=True) == tiles.WARP_SPECIALISED else (tile,)
        for tile in found
    ]
    return tuple(tile for some in both for tile in some)[:3]


def gemm_launch(
    target: Target, x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, u: Tensor, bits: Tensor | None, y: Tensor,
    tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """y (M, N) = x (M, K) w (K, N) + bias (N,) + keep * (s (M, R) u (R, N)); y's rows lie side by side.

    Raises:
        ValueError: `tile` wants tensor descriptors, which cannot show x, w or y.
    """
    (M, K), (R, N) = x.shape, u.shape
    precision = tiles.input_precision(x.dtype, target)
    if tile is None:
        tile = candidates(target, x, w, u, bits is not None, y)[0]
    elif tile.tma and not descriptors_fit(x, w, y):
        raise ValueError(
            f"tile {tile} needs rows of whole 16-byte pieces that do not overlap: strides {x.stride()} and {w.stride()}"
        )
    if tile.ws:
        return _specialised().launch(target, x, w, bias, s, u, bits, y, tile)
    by_n = rows_by_n(w)
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    block_r = min(tiles.padded_rank(R), tiles.rank_block(target, tiles.kind_of(x.dtype, precision)))
    programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    args = {
        "bias_ptr": bias, "s_ptr": s, "u_ptr": u, "bits_ptr": bits,
        "M": M, "N": N, "K": K, "R": R,
    }  # fmt: skip
    strides = {
        "stride_bias": 0 if bias is None else bias.stride(0), "stride_sm": s.stride(0), "stride_sr": s.stride(1),
        "stride_ur": u.stride(0), "stride_un": u.stride(1),
    }  # fmt: skip
    constants = {
        "RANK_STEPS": triton.cdiv(R, block_r), "BLOCK_R": block_r, "INPUT_PRECISION": precision,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip
    drops = 0 if bits is None else STORED.value
    if not tile.tma:
        moves = {
            "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_wk": w.stride(0), "stride_wn": w.stride(1),
            "stride_ym": y.stride(0),
        }  # fmt: skip
        flags = {"DROPOUT": drops, "EVEN_K": K % block_k == 0}
        args = {"x_ptr": x, "w_ptr": w, "y_ptr": y} | args | moves | strides | flags | constants
        return Launch(gemm_kernel, (programs,), args, tile.options)
    wide = w.t() if by_n else w
    args = {
        "x_desc": TensorDescriptor(x, x.shape, x.stride(), [block_m, block_k]),
        "w_desc": TensorDescriptor(wide, wide.shape, wide.stride(), [block_n, block_k] if by_n else [block_k, block_n]),
        "y_desc": TensorDescriptor(y, y.shape, y.stride(), [block_m, block_n // 4]),
    } | args  # fmt: skip
    # Not on sm_100: triton 3.6 fails on its tensor memory there.
    flags = {"DROPOUT": drops, "W_BY_N": by_n, "FLATTEN": target.family == 90}
    count = tiles.multiprocessors(x.device, target)
    return Launch(gemm_tma_kernel, (min(programs, count),), args | strides | flags | constants, tile.options)


def gemm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, lora_B: Tensor, out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + bias + S Bᵀ: x (M, K), weight (N, K), bias (N,) or None, S (M, R), lora_B (N, R) -> y (M, N).

    x, weight and S share a dtype (float16, bfloat16, float32), which y has too; lora_B has it or is float32. Any
    strides; y is contiguous. `out`, contiguous (M, N), receives y when given. `tile` overrides the table.
    """
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    gemm_launch(tiles.target_of(x.device), x, weight.t(), bias, S, lora_B.t(), None, y, tile).run()
    return y


def gemm_dx(
    dy: Tensor, weight: Tensor, dS: Tensor, lora_A: Tensor, bits: Tensor | None = None, out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """dx = dy W + keep * (dS A): dy (M, N), weight (N, K), dS (M, R), lora_A (R, K) -> dx (M, K).

    dy, weight and dS share a dtype, which dx has too; lora_A has it or is float32. Any strides; dx is contiguous. The
    mask is the one that forward applied to x, `bits` that `da` or `dropout.mask_launch` left; None: nothing is dropped.
    """
    dx = torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device) if out is None else out
    gemm_launch(tiles.target_of(dy.device), dy, weight, None, dS, lora_A, bits, dx, tile).run()
    return dx
