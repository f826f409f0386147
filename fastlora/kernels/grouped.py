"""One launch for several projections of one x, where each would have its own: what a small layer takes is launches.

    forward    yᵢ = Sᵢ Bᵢᵀ + biasᵢ                    `up_each`, to which ATen then adds x Wᵢᵀ
    backward   dSᵢ = scalingᵢ dYᵢ Bᵢ, dBᵢ = dYᵢᵀ Sᵢ   `ds_db_each`

Each is its kernel of one projection with one more axis of programs, along which a program picks its operands. At most
PROJECTIONS of them; what they pick among is of one kind (`groups`). The products with W: gemm_each.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.gemm import add_rest, add_update, store_part
from fastlora.kernels.grads import ds_db, walk
from fastlora.kernels.launch import Launch, run
from fastlora.kernels.partials import sum_launches
from fastlora.kernels.tiles import Target, Tile
from fastlora.kernels.up import up

PROJECTIONS = 3


def each(name: str, values: Sequence) -> dict:
    """An argument for each of PROJECTIONS projections, None for those that are not there."""
    return {name.format(i): values[i] if i < len(values) else None for i in range(PROJECTIONS)}


@triton.jit
def pick(i, first, second, third):
    """The i-th of those that are there; the first is, for Triton 3.6 returns no None."""
    if second is not None:
        first = tl.where(i == 1, second, first)
    if third is not None:
        first = tl.where(i == 2, third, first)
    return first


def groups(Bs: Sequence[Tensor], biases: Sequence[Tensor | None], weights: Sequence[Tensor] = ()) -> list[slice]:
    """PROJECTIONS each, where programs can pick among them: B's dtype, W's strides, contiguous biases of all or none.
    Else one by one."""
    found = []
    for first in range(0, len(Bs), PROJECTIONS):
        some = range(first, min(first + PROJECTIONS, len(Bs)))
        kinds = {(Bs[i].dtype, biases[i] is None, weights[i].stride() if weights else None) for i in some}
        alike = len(kinds) == 1 and all(b is None or b.is_contiguous() for b in biases[some.start : some.stop])
        found += [slice(some.start, some.stop)] if alike else [slice(i, i + 1) for i in some]
    return found


def ranks_of(target: Target, dtype: torch.dtype, ranks: Sequence[int]) -> dict:
    """The constants of the update's product."""
    precision = tiles.input_precision(dtype, target)
    block_r = min(tiles.padded_rank(max(ranks)), tiles.rank_block(target, tiles.kind_of(dtype, precision)))
    return {"RANK_STEPS": triton.cdiv(max(ranks), block_r), "BLOCK_R": block_r, "INPUT_PRECISION": precision}


def updates(Ss: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]) -> dict:
    return each("s{}_ptr", Ss) | each("b{}_ptr", Bs) | each("bias{}_ptr", biases) | each("y{}_ptr", ys)


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
    bias_ptr = bias0_ptr if bias0_ptr is None else pick(n, bias0_ptr, bias1_ptr, bias2_ptr)
    acc = add_rest(
        acc, start_m, start_n, bias_ptr, 1, (s_ptr, b_ptr, R, 1, 1, R), None, M, N, R,
        0, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    store_part(acc, pick(n, y0_ptr, y1_ptr, y2_ptr), start_m, start_n, M, N, N)


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


def up_each_launch(
    target: Target, Ss: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]
) -> Launch:
    """yᵢ (M, N) = Sᵢ Bᵢᵀ + biasᵢ; all contiguous."""
    M, Ns, ranks = Ss[0].shape[0], [B.shape[0] for B in Bs], [B.shape[1] for B in Bs]
    constants = ranks_of(target, Ss[0].dtype, ranks)
    tile = tiles.rank_tiles("up", target, max(ranks), tiles.kind_of(Ss[0].dtype, constants["INPUT_PRECISION"]))[0]
    args = {**updates(Ss, Bs, biases, ys), "M": M, **each("N{}", Ns), **each("R{}", ranks), **constants}
    grid = (triton.cdiv(M, tile.block_m), triton.cdiv(max(Ns), tile.block_n), len(Bs))
    return Launch(up_each_kernel, grid, args | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}, tile.options)


def up_each(Ss: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]) -> None:
    """yᵢ = Sᵢ Bᵢᵀ + biasᵢ: S (M, R), B (N, R) and y (M, N) contiguous, bias (N,) or None."""
    for one in groups(Bs, biases):
        if one.stop - one.start > 1:
            up_each_launch(tiles.target_of(ys[0].device), Ss[one], Bs[one], biases[one], ys[one]).run()
        else:
            up(Ss[one.start], Bs[one.start].t(), biases[one.start], None, ys[one.start])


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
