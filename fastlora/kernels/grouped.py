"""One launch for several projections of one x, where each would have its own: what a small layer takes is launches.

    forward    yᵢ = Sᵢ Bᵢᵀ + biasᵢ                  `up_each`, to which ATen then adds x Wᵢᵀ
               yᵢ = x Wᵢᵀ + Sᵢ Bᵢᵀ + biasᵢ          `gemm_each`
    backward   dSᵢ = scalingᵢ dYᵢ Bᵢ, dBᵢ = dYᵢᵀ Sᵢ   `ds_db_each`
               dx += Σ dYᵢ Wᵢ                        `gemm_sum`: one accumulator, so that dx is read and written once

Each is its kernel of one projection with one more axis of programs, along which a program picks its operands; the last
one has the loop of the GEMM once for each. At most MOST projections; what they pick among is of one kind (`groups`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import tiles
from fastlora.kernels.gemm import (
    add_product,
    add_rest,
    add_update,
    gemm_forward,
    halves,
    shown,
    store_part,
    tile_origin,
)
from fastlora.kernels.grads import ds_db, walk
from fastlora.kernels.launch import Launch, run
from fastlora.kernels.partials import sum_launches
from fastlora.kernels.product import dot
from fastlora.kernels.tiles import Target, Tile
from fastlora.kernels.up import up

MOST = 3


def each(name: str, values: Sequence) -> dict:
    """An argument for each of MOST projections, None for those that are not there."""
    return {name.format(i): values[i] if i < len(values) else None for i in range(MOST)}


@triton.jit
def pick(i, first, second, third):
    """The i-th; None for those that are not there."""
    if second is not None:
        first = tl.where(i == 1, second, first)
    if third is not None:
        first = tl.where(i == 2, third, first)
    return first


@triton.jit
def up_each_kernel(
    s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, N0, N1, N2, R0, R1, R2,
    RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n) writes tile (i, j) of the n-th y."""
    n = tl.program_id(2)
    N = pick(n, N0, N1, N2)
    if tl.program_id(1) * BLOCK_N < N:
        write_update(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, M, N, n,
            s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
            R0, R1, R2, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip


@triton.jit
def write_update(
    acc, start_m, start_n, M, N, n,
    s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
    R0, R1, R2, RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the n-th y: acc + S Bᵀ + bias; S (M, R), B (N, R) and y (M, N) contiguous."""
    R = pick(n, R0, R1, R2)
    s_ptr = pick(n, s0_ptr, s1_ptr, s2_ptr)
    b_ptr = pick(n, b0_ptr, b1_ptr, b2_ptr)
    acc = add_update(acc, s_ptr, b_ptr, start_m, start_n, M, N, R, R, 1, 1, R, RANK_STEPS, BLOCK_R, INPUT_PRECISION)
    bias_ptr = pick(n, bias0_ptr, bias1_ptr, bias2_ptr)
    acc = add_rest(
        acc, start_m, start_n, bias_ptr, 1, (s_ptr, b_ptr, R, 1, 1, R), None, M, N, R,
        0, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    store_part(acc, pick(n, y0_ptr, y1_ptr, y2_ptr), start_m, start_n, M, N, N)


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


@triton.jit
def ds_db_each_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, b0_ptr, b1_ptr, b2_ptr, s0_ptr, s1_ptr, s2_ptr, ds0_ptr, ds1_ptr, ds2_ptr,
    db0_ptr, db1_ptr, db2_ptr, scaling0, scaling1, scaling2, M, N0, N1, N2, R0, R1, R2, region_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n): `ds_db_kernel`'s (i, j) for the n-th dY, which is contiguous as B and S are."""
    n = tl.program_id(2)
    N = pick(n, N0, N1, N2)
    R = pick(n, R0, R1, R2)
    if tl.program_id(0) * BLOCK_N < N:
        walk(
            pick(n, dy0_ptr, dy1_ptr, dy2_ptr), pick(n, b0_ptr, b1_ptr, b2_ptr), pick(n, s0_ptr, s1_ptr, s2_ptr),
            pick(n, ds0_ptr, ds1_ptr, ds2_ptr), pick(n, db0_ptr, db1_ptr, db2_ptr), None,
            pick(n, scaling0, scaling1, scaling2), tl.program_id(0), tl.program_id(1), M, N, N, 1, R, 1, region_m, R,
            BLOCK_M, BLOCK_N, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip


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
    acc,
    dy_desc,
    w_desc,
    start_m,
    start_k,
    N,
    BLOCK_N: tl.constexpr,
    W_BY_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
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


def _ranks(target: Target, dtype: torch.dtype, ranks: Sequence[int]) -> dict:
    """The constants of the update's product."""
    precision = tiles.input_precision(dtype, target)
    block_r = min(tiles.padded_rank(max(ranks)), tiles.rank_block(target, tiles.kind_of(dtype, precision)))
    return {"RANK_STEPS": triton.cdiv(max(ranks), block_r), "BLOCK_R": block_r, "INPUT_PRECISION": precision}


def _updates(Ss: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]) -> dict:
    return each("s{}_ptr", Ss) | each("b{}_ptr", Bs) | each("bias{}_ptr", biases) | each("y{}_ptr", ys)


def up_each_launch(
    target: Target, Ss: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]
) -> Launch:
    """yᵢ (M, N) = Sᵢ Bᵢᵀ + biasᵢ; all contiguous."""
    M, Ns, ranks = Ss[0].shape[0], [B.shape[0] for B in Bs], [B.shape[1] for B in Bs]
    constants = _ranks(target, Ss[0].dtype, ranks)
    tile = tiles.rank_tiles("up", target, max(ranks), tiles.kind_of(Ss[0].dtype, constants["INPUT_PRECISION"]))[0]
    args = {**_updates(Ss, Bs, biases, ys), "M": M, **each("N{}", Ns), **each("R{}", ranks), **constants}
    grid = (triton.cdiv(M, tile.block_m), triton.cdiv(max(Ns), tile.block_n), len(Bs))
    return Launch(up_each_kernel, grid, args | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}, tile.options)


def gemm_each_tiles(target: Target, kind: str, R: int, aligned: bool) -> list[Tile]:
    """Those of `gemm_each_kernel`: with larger ones, and of float32, it would spill somewhere."""
    if kind != "half" and target.backend != "interpreter":
        return []
    found = tiles.gemm_row(target, kind, R, aligned, False, False)
    return [tile for tile in found if tile.block_m * tile.block_n <= 64 * 64]


def gemm_sum_tiles(target: Target, kind: str, aligned: bool, tma: bool) -> tuple[Tile, ...]:
    """Those of the kernels of `gemm_sum`: of float32 in registers the largest alone, another spills on sm_100."""
    found = tiles.gemm_row(target, kind, 1, aligned, False, tma)
    return found[:1] if kind == "ieee" else found


def gemm_each_launch(
    target: Target, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], Ss: Sequence[Tensor],
    Bs: Sequence[Tensor], ys: Sequence[Tensor], tile: Tile | None = None,
) -> Launch | None:  # fmt: skip
    """yᵢ (M, N) = x Wᵢᵀ + Sᵢ Bᵢᵀ + biasᵢ; x of any strides, the rest contiguous, W so or its transpose. None where the
    tile of so large a product is none of `gemm_each_tiles`."""
    (M, K), Ns, ranks, w = x.shape, [B.shape[0] for B in Bs], [B.shape[1] for B in Bs], weights[0].t()
    constants = _ranks(target, x.dtype, ranks)
    if tile is None:
        kind, R = tiles.kind_of(x.dtype, constants["INPUT_PRECISION"]), max(ranks)
        tile, aligned = _tile(target, M, sum(Ns), R, kind, [x, *ys, *weights], False)
        if tile not in gemm_each_tiles(target, kind, R, aligned):
            return None
    args = {
        "x_ptr": x, **each("w{}_ptr", weights), **_updates(Ss, Bs, biases, ys), "M": M, **each("N{}", Ns), "K": K,
        **each("R{}", ranks), "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_wk": w.stride(0),
        "stride_wn": w.stride(1), "EVEN_K": K % tile.block_k == 0, **constants,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
    }  # fmt: skip
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(max(Ns), tile.block_n), len(Bs))
    return Launch(gemm_each_kernel, grid, args, tile.options)


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


def _descriptor(t: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, t.shape, t.stride(), box)


def _ordered(kernel, args: dict) -> dict:
    return {name: args[name] for name in kernel.arg_names}


def ds_db_each_launches(
    target: Target, dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], scalings: Sequence[float],
    tile: Tile | None = None,
) -> tuple[list[Launch], list[Tensor], list[Tensor]] | None:  # fmt: skip
    """The launches, dSᵢ (M, R) and dBᵢ (N, R); all contiguous. None where two reads of dY are better, one by one."""
    M, Ns, ranks = dys[0].shape[0], [B.shape[0] for B in Bs], [B.shape[1] for B in Bs]
    precision, itemsize = tiles.input_precision(dys[0].dtype, target), dys[0].dtype.itemsize
    kind = tiles.kind_of(dys[0].dtype, precision)
    if tile is None and tiles.ds_db_tile(target, M, max(Ns), max(ranks), kind, itemsize) is None:
        return None
    tile = tile or tiles.rank_tiles("ds_db", target, max(ranks), kind)[-1]  # the first one's picks spill on sm_80
    parts = [triton.cdiv(N, tile.block_n) for N in Ns]
    parts_m, region_m = tiles.regions(target, M, tile, sum(parts))

    def partials(outs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Where the launch writes: all results, or partials of all."""
        if max(counts) == 1:
            return list(outs)
        return [out.new_empty((n, *out.shape), dtype=torch.float32) for out, n in zip(outs, counts, strict=True)]

    dSs, dBs = [torch.empty_like(S) for S in Ss], [torch.empty_like(B) for B in Bs]
    ds, db = partials(dSs, parts), partials(dBs, [parts_m] * len(dBs))
    args = {
        **each("dy{}_ptr", dys), **each("b{}_ptr", Bs), **each("s{}_ptr", Ss), **each("ds{}_ptr", ds),
        **each("db{}_ptr", db), **each("scaling{}", [float(s) for s in scalings]), "M": M, **each("N{}", Ns),
        **each("R{}", ranks), "region_m": region_m, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_R": tiles.padded_rank(max(ranks)), "INPUT_PRECISION": precision,
    }  # fmt: skip
    sums = [(part, out) for part, out in zip([*ds, *db], [*dSs, *dBs], strict=True) if part is not out]
    first = Launch(ds_db_each_kernel, (max(parts), parts_m, len(Bs)), args, tile.options)
    return [first, *sum_launches(*sums)], dSs, dBs


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


def groups(Bs: Sequence[Tensor], biases: Sequence[Tensor | None], weights: Sequence[Tensor] = ()) -> list[slice]:
    """MOST projections each, where programs can pick among them: B's dtype, W's strides, contiguous biases of all or of
    none. Else one by one."""
    found = []
    for first in range(0, len(Bs), MOST):
        some = range(first, min(first + MOST, len(Bs)))
        kinds = {(Bs[i].dtype, biases[i] is None, weights[i].stride() if weights else None) for i in some}
        alike = len(kinds) == 1 and all(b is None or b.is_contiguous() for b in biases[some.start : some.stop])
        found += [slice(some.start, some.stop)] if alike else [slice(i, i + 1) for i in some]
    return found


def up_each(Ss: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]) -> None:
    """yᵢ = Sᵢ Bᵢᵀ + biasᵢ: S (M, R), B (N, R) and y (M, N) contiguous, bias (N,) or None."""
    for one in groups(Bs, biases):
        if one.stop - one.start > 1:
            up_each_launch(tiles.target_of(ys[0].device), Ss[one], Bs[one], biases[one], ys[one]).run()
        else:
            up(Ss[one.start], Bs[one.start].t(), biases[one.start], None, ys[one.start])


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


def ds_db_each(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], scalings: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """dSᵢ (M, R) = scalingᵢ dYᵢ Bᵢ in dY's dtype and dBᵢ (N, R) = dYᵢᵀ Sᵢ in B's, contiguous as all operands are."""
    target, dSs, dBs = tiles.target_of(dys[0].device), [], []
    for one in groups(Bs, [None] * len(Bs)):
        operands = dys[one], Bs[one], Ss[one], scalings[one]
        found = ds_db_each_launches(target, *operands) if one.stop - one.start > 1 else None
        if found is None:
            made = [ds_db(*each_one) for each_one in zip(*operands, strict=True)]
            found = [], [dS for dS, _ in made], [dB for _, dB in made]
        run(found[0])
        dSs += found[1]
        dBs += found[2]
    return dSs, dBs


def gemm_sum(dys: Sequence[Tensor], weights: Sequence[Tensor], dx: Tensor) -> None:
    """dx (M, K) += Σ dYᵢ (M, N) Wᵢ (N, K); dx and dY contiguous, weights of any strides."""
    target = tiles.target_of(dx.device)
    for first in range(0, len(dys), MOST):
        part = slice(first, first + MOST)
        gemm_sum_launch(target, dys[part], weights[part], dx).run()
