"""The GEMMs of several projections of one x in one launch, as grouped.py has what comes beside them.

forward    yᵢ = x Wᵢᵀ + Sᵢ Bᵢᵀ + biasᵢ   `gemm_each`: a program picks its projection
backward   dx += Σ dYᵢ Wᵢ                `gemm_sum`: the GEMM's loop once for each, one accumulator; dx is read and
                                         written once
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import tiles
from fastlora.kernels.gemm import add_product, gemm_forward, halves, shown, store_part, tile_origin
from fastlora.kernels.grouped import PROJECTIONS, each, groups, pick, ranks_of, updates, write_update
from fastlora.kernels.launch import Launch
from fastlora.kernels.product import dot
from fastlora.kernels.tiles import Target, Tile


@triton.jit
def gemm_each_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr,
    bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, N0, N1, N2, K, R0, R1, R2, stride_xm, stride_xk, stride_wk, stride_wn,
    EVEN_K: tl.constexpr, RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (i, n) writes tile i of the n-th y, through pointers."""
    n = tl.program_id(1)
    N = pick(n, N0, N1, N2)
    if tl.program_id(0) < tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N):
        start_m, start_n = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = add_product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x_ptr, pick(n, w0_ptr, w1_ptr, w2_ptr), start_m, start_n, M, N, K,
            stride_xm, stride_xk, stride_wk, stride_wn, EVEN_K, BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
        write_update(
            acc, start_m, start_n, M, N, n,
            s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
            R0, R1, R2, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip


def gemm_each_tiles(target: Target, kind: str, R: int, aligned: bool) -> list[Tile]:
    """Those of `gemm_each_kernel`: with larger ones, and of float32, it would spill somewhere."""
    if kind != "half" and target.backend != "interpreter":
        return []
    found = tiles.gemm_row(target, kind, R, aligned, False, False)
    return [tile for tile in found if tile.block_m * tile.block_n <= 64 * 64]


def gemm_each_launch(
    target: Target, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], Ss: Sequence[Tensor],
    Bs: Sequence[Tensor], ys: Sequence[Tensor], tile: Tile | None = None,
) -> Launch | None:  # fmt: skip
    """yᵢ (M, N) = x Wᵢᵀ + Sᵢ Bᵢᵀ + biasᵢ; x of any strides, the rest contiguous, W so or its transpose. None where the
    tile of so large a product is none of `gemm_each_tiles`."""
    (M, K), Ns, ranks, w = x.shape, [B.shape[0] for B in Bs], [B.shape[1] for B in Bs], weights[0].t()
    constants = ranks_of(target, x.dtype, ranks)
    if tile is None:
        kind, R = tiles.kind_of(x.dtype, constants["INPUT_PRECISION"]), max(ranks)
        tile, aligned = _tile(target, M, sum(Ns), R, kind, [x, *ys, *weights], False)
        if tile not in gemm_each_tiles(target, kind, R, aligned):
            return None
    args = {
        "x_ptr": x, **each("w{}_ptr", weights), **updates(Ss, Bs, biases, ys), "M": M, **each("N{}", Ns), "K": K,
        **each("R{}", ranks), "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_wk": w.stride(0),
        "stride_wn": w.stride(1), "EVEN_K": K % tile.block_k == 0, **constants,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(max(Ns), tile.block_n), len(Bs))
    return Launch(gemm_each_kernel, grid, args, tile.options)


def gemm_each(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], Ss: Sequence[Tensor],
    Bs: Sequence[Tensor], ys: Sequence[Tensor],
) -> None:  # fmt: skip
    """yᵢ = x Wᵢᵀ + Sᵢ Bᵢᵀ + biasᵢ: in one launch where small tiles are the best, else each by `gemm_forward`.

    x (M, K) and W (N, K) of any strides, the rest as for `up_each`."""
    target = tiles.target_of(x.device)
    for one in groups(Bs, biases, weights):
        operands = weights[one], biases[one], Ss[one], Bs[one], ys[one]
        launch = gemm_each_launch(target, x, *operands) if one.stop - one.start > 1 else None
        if launch:
            launch.run()
            continue
        for W, bias, S, B, y in zip(*operands, strict=True):
            gemm_forward(x, W, bias, S, B, out=y)


@triton.jit
def gemm_sum_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, w0_ptr, w1_ptr, w2_ptr, dx_ptr, M, N0, N1, N2, K,
    stride_w0n, stride_w1n, stride_w2n, stride_w0k, stride_w1k, stride_w2k,
    EVEN_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program, one tile of dx: dx (M, K) and each dY (M, N) contiguous."""
    start_m, start_k = tile_origin(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP_M)
    acc = add_product(
        tl.zeros([BLOCK_M, BLOCK_K], tl.float32), dy0_ptr, w0_ptr, start_m, start_k, M, K, N0,
        N0, 1, stride_w0n, stride_w0k, EVEN_N, BLOCK_N, INPUT_PRECISION,
    )  # fmt: skip
    if dy1_ptr is not None:
        acc = add_product(
            acc, dy1_ptr, w1_ptr, start_m, start_k, M, K, N1, N1, 1, stride_w1n, stride_w1k,
            EVEN_N, BLOCK_N, INPUT_PRECISION,
        )  # fmt: skip
    if dy2_ptr is not None:
        acc = add_product(
            acc, dy2_ptr, w2_ptr, start_m, start_k, M, K, N2, N2, 1, stride_w2n, stride_w2k,
            EVEN_N, BLOCK_N, INPUT_PRECISION,
        )  # fmt: skip
    offs_m = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    acc += tl.load(dx_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    store_part(acc, dx_ptr, start_m, start_k, M, K, K)


@triton.jit
def add_by_descriptors(
    acc, dy_desc, w_desc, start_m, start_k, N,
    BLOCK_N: tl.constexpr, W_BY_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    for start_n in range(0, N, BLOCK_N):
        dy = dy_desc.load([start_m, start_n])
        w = w_desc.load([start_n, start_k]) if W_BY_N else w_desc.load([start_k, start_n]).T
        acc = dot(dy, w, acc, INPUT_PRECISION)
    return acc


@triton.jit
def gemm_sum_tma_kernel(
    dy0_desc, dy1_desc, dy2_desc, w0_desc, w1_desc, w2_desc, dx_desc, M, N0, N1, N2, K,
    W_BY_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same in a persistent grid, all of it through descriptors; dx comes and goes in quarters."""
    for tile_id in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K), tl.num_programs(0)):
        start_m, start_k = tile_origin(tile_id, M, K, BLOCK_M, BLOCK_K, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        acc = add_by_descriptors(acc, dy0_desc, w0_desc, start_m, start_k, N0, BLOCK_N, W_BY_N, INPUT_PRECISION)
        if dy1_desc is not None:
            acc = add_by_descriptors(acc, dy1_desc, w1_desc, start_m, start_k, N1, BLOCK_N, W_BY_N, INPUT_PRECISION)
        if dy2_desc is not None:
            acc = add_by_descriptors(acc, dy2_desc, w2_desc, start_m, start_k, N2, BLOCK_N, W_BY_N, INPUT_PRECISION)
        left, right = halves(acc)
        for half in tl.static_range(2):
            first, second = halves(left if half == 0 else right)
            for quarter in tl.static_range(2):
                part_k = start_k + (2 * half + quarter) * (BLOCK_K // 4)
                part = first if quarter == 0 else second
                part += dx_desc.load([start_m, part_k]).to(tl.float32)
                dx_desc.store([start_m, part_k], part.to(dx_desc.dtype))


def gemm_sum_tiles(target: Target, kind: str, aligned: bool, tma: bool) -> tuple[Tile, ...]:
    """Those of the kernels of `gemm_sum`: of float32 in registers the largest alone, another spills on sm_100."""
    found = tiles.gemm_row(target, kind, 1, aligned, False, tma)
    return found[:1] if kind == "ieee" else found


def gemm_sum_launch(
    target: Target, dys: Sequence[Tensor], weights: Sequence[Tensor], dx: Tensor, tile: Tile | None = None
) -> Launch:
    """dx (M, K) += Σ dYᵢ (M, N) Wᵢ (N, K); dx and dY contiguous, weights of any strides."""
    (M, K), Ns, precision = dx.shape, [dy.shape[1] for dy in dys], tiles.input_precision(dx.dtype, target)
    by_n = weights[0].stride(1) == 1
    if tile is None:
        kind = tiles.kind_of(dx.dtype, precision)
        one_way = all((w.stride(1) == 1) == by_n for w in weights)  # a descriptor's box is of one for all
        tile, aligned = _tile(target, M, K, 1, kind, [dx, *dys, *weights], one_way)
        tile = tile if kind != "ieee" else gemm_sum_tiles(target, kind, aligned, False)[0]
    shared = {
        "M": M, **each("N{}", Ns), "K": K, "INPUT_PRECISION": precision,
        "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_n, "BLOCK_N": tile.block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip
    programs = triton.cdiv(M, tile.block_m) * triton.cdiv(K, tile.block_n)
    if tile.tma:
        rows, middle, columns = tile.block_m, tile.block_k, tile.block_n
        box = [middle, columns] if by_n else [columns, middle]
        args = {
            **each("dy{}_desc", [_descriptor(dy, [rows, middle]) for dy in dys]),
            **each("w{}_desc", [_descriptor(w if by_n else w.t(), box) for w in weights]),
            "dx_desc": _descriptor(dx, [rows, columns // 4]), "W_BY_N": by_n,
        }  # fmt: skip
        grid = (min(programs, tiles.multiprocessors(dx.device, target)),)
        return Launch(gemm_sum_tma_kernel, grid, _ordered(gemm_sum_tma_kernel, args | shared), tile.options)
    args = {
        **each("dy{}_ptr", dys), **each("w{}_ptr", weights), "dx_ptr": dx,
        **each("stride_w{}n", [w.stride(0) for w in weights]), **each("stride_w{}k", [w.stride(1) for w in weights]),
        "EVEN_N": all(n % tile.block_k == 0 for n in Ns),
    }  # fmt: skip
    return Launch(gemm_sum_kernel, (programs,), _ordered(gemm_sum_kernel, args | shared), tile.options)


def gemm_sum(dys: Sequence[Tensor], weights: Sequence[Tensor], dx: Tensor) -> None:
    """dx (M, K) += Σ dYᵢ (M, N) Wᵢ (N, K); dx and dY contiguous, weights of any strides."""
    target = tiles.target_of(dx.device)
    for first in range(0, len(dys), PROJECTIONS):
        part = slice(first, first + PROJECTIONS)
        gemm_sum_launch(target, dys[part], weights[part], dx).run()


def _tile(
    target: Target, M: int, N: int, R: int, kind: str, operands: Sequence[Tensor], descriptors: bool = True
) -> tuple[Tile, bool]:
    """The default for a product of these, whose rows, or a weight's columns, lie side by side in the best case; and
    whether they are aligned."""
    by_rows = operands[-1].stride(1) == 1  # a weight
    wide = [t if by_rows or t.stride(1) == 1 else t.t() for t in operands]
    aligned = all(t.stride(1) == 1 and (t.stride(0) | t.shape[1]) % 16 == 0 for t in wide)
    count = tiles.multiprocessors(operands[0].device, target)
    tma = descriptors and all(map(shown, wide))
    return tiles.gemm_tiles(target, M, N, R, kind, aligned, False, tma, count)[0], aligned


def _descriptor(t: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, t.shape, t.stride(), box)


def _ordered(kernel, args: dict) -> dict:
    return {name: args[name] for name in kernel.arg_names}
