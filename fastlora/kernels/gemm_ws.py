"""The GEMM of `gemm.py` with its warps specialised, in Gluon, for sm_90: one warp loads, eight multiply.

    Y = X W + bias + keep * (S U)

Blocks of X and W go through a ring of stages in shared memory. The loading warp fills a stage by TMA as soon as it is
empty, a tile ahead of the others if it can; those multiply it by `wgmma` while the stage before is given back. S and U
pass through the same ring as the first steps of a tile, so that the mask is applied to S U in the accumulator before
any of X W is in it: no second accumulator. What TMA reads beyond an edge is zero, and what it writes there is left out.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastlora.kernels import gemm, tiles
from fastlora.kernels.dropout import STORED
from fastlora.kernels.launch import Launch
from fastlora.kernels.tiles import Target, Tile

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
LOADING_REGISTERS = gl.constexpr(24)  # of each thread of the loading warp; the others share what that leaves
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # before triton 3.8
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

tile_origin = gluon.jit(gemm.tile_origin.fn)


@gluon.jit
def fill(x_desc, w_desc, ring, step, start_m, start_n, start_k, BY_N: gl.constexpr):
    """Starts to load the blocks of X at (start_m, start_k) and of W at (start_k, start_n) into the stage of `step`."""
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
    async_load(x_desc, [start_m, start_k], full.index(stage), x_ring.index(stage))
    if BY_N:
        async_load(w_desc, [start_n, start_k], full.index(stage), w_ring.index(stage))
    else:
        async_load(w_desc, [start_k, start_n], full.index(stage), w_ring.index(stage))
    return step + 1


@gluon.jit
def load_tiles(
    x_desc, w_desc, s_desc, u_desc, ring, M, N, K,
    BY_N: gl.constexpr, RANK_STEPS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The loading warp: all blocks of all tiles of this program, in the order in which they are multiplied."""
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile_id in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = tile_origin(tile_id, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for r in gl.static_range(RANK_STEPS):
            step = fill(s_desc, u_desc, ring, step, start_m, start_n, r * BLOCK_K, BY_N)
        for start_k in range(0, K, BLOCK_K):
            step = fill(x_desc, w_desc, ring, step, start_m, start_n, start_k, BY_N)


@gluon.jit
def multiply(acc, ring, step, DEPTH: gl.constexpr, FIRST: gl.constexpr, BY_N: gl.constexpr):
    """acc + the product of the first DEPTH columns in the stage of `step`, which goes on; the stage before is empty."""
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    x = x_ring.index(stage).slice(0, DEPTH, dim=1)
    if BY_N:
        w = w_ring.index(stage).slice(0, DEPTH, dim=1).permute((1, 0))
    else:
        w = w_ring.index(stage).slice(0, DEPTH, dim=0)
    acc = warpgroup_mma(x, w, acc, use_acc=not FIRST, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    if not FIRST:
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return acc


@gluon.constexpr_function
def bits_layout(ROWS, BYTES):
    """Each thread has the rows that it has of an accumulator, whole: they come in 16 bytes at a time."""
    bytes_ = [[0, 1 << i] for i in range(BYTES.bit_length() - 1)]
    warps = [[16 << i, 0] for i in range((ROWS // 16).bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*bytes_, [8, 0]], lanes, warps, [], [ROWS, BYTES])


@gluon.jit
def load_bits(bits_ptr, start_m, start_n, M, bytes_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The mask of a tile, eight columns a byte: [BLOCK_M, BLOCK_N // 8]."""
    layout: gl.constexpr = bits_layout(BLOCK_M, BLOCK_N // 8)
    offs_m = (start_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))).to(gl.int64)
    offs_b = start_n // 8 + gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, layout))
    bits_ptrs = bits_ptr + offs_m[:, None] * bytes_n + offs_b[None, :]
    return gl.load(bits_ptrs, mask=(offs_m < M)[:, None] & (offs_b < bytes_n)[None, :], other=0)


@gluon.jit
def drop(acc, bits):
    """acc with zeros where the mask's bits are 0."""
    pieces = acc.reshape((bits.shape[0], bits.shape[1], 8))
    layout: gl.constexpr = pieces.type.layout
    bits = gl.expand_dims(gl.convert_layout(bits, gl.SliceLayout(2, layout)), 2)
    shifts = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout))).to(gl.uint8)
    pieces = gl.where((bits >> shifts[None, None, :] & 1) != 0, pieces, 0.0)
    return gl.convert_layout(pieces.reshape(acc.shape), acc.type.layout, assert_trivial=True)


@gluon.jit
def halves(t):
    """Left and right half of a tile."""
    return t.reshape((t.shape[0], 2, t.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def store_part(part, y_desc, y_buffer, start_m, start_n):
    """Starts to store part at (start_m, start_n), by way of a buffer that the store before the last has left."""
    tma.store_wait(1)
    y_buffer.store(part.to(y_desc.dtype))
    fence_async_shared()
    async_store(y_desc, [start_m, start_n], y_buffer)


@gluon.jit
def multiply_tiles(
    y_desc, bias_ptr, bits_ptr, ring, y_buffers, M, N, K, stride_bias, bytes_n,
    DROPOUT: gl.constexpr, BY_N: gl.constexpr, RANK_STEPS: gl.constexpr, BLOCK_R: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The other warps: each tile's products, S U first, and the tile stored by quarters."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile_id in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = tile_origin(tile_id, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        if DROPOUT:
            bits = load_bits(bits_ptr, start_m, start_n, M, bytes_n, BLOCK_M, BLOCK_N)
        for r in gl.static_range(RANK_STEPS):
            acc = multiply(acc, ring, step, BLOCK_R, r == 0, BY_N)
            step += 1
        if DROPOUT:
            acc = drop(warpgroup_mma_wait(0, deps=(acc,)), bits)
        for _ in range(0, K, BLOCK_K):
            acc = multiply(acc, ring, step, BLOCK_K, False, BY_N)
            step += 1
        if bias_ptr is not None:  # it comes while the last products are made
            offs_n = (start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))).to(gl.int64)
            bias = gl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(ring[3].index((step - 1) % ring[0].shape[0]), count=1)
        if bias_ptr is not None:
            acc += bias.to(gl.float32)[None, :]
        left, right = halves(acc)
        for half in gl.static_range(2):
            first, second = halves(left if half == 0 else right)
            for quarter in gl.static_range(2):
                part, part_n = first if quarter == 0 else second, start_n + (2 * half + quarter) * (BLOCK_N // 4)
                store_part(part, y_desc, y_buffers.index(quarter), start_m, part_n)
    tma.store_wait(0)


@gluon.jit
def gemm_ws_kernel(
    x_desc, w_desc, s_desc, u_desc, y_desc, bias_ptr, bits_ptr, M, N, K, stride_bias, bytes_n,
    DROPOUT: gl.constexpr, BY_N: gl.constexpr, RANK_STEPS: gl.constexpr, BLOCK_R: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A persistent grid. The launch's warps multiply; the one that loads, Triton adds to them."""
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    across: gl.constexpr = w_desc.block_type.shape
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, across[0], across[1]], w_desc.layout)
    y_buffers = gl.allocate_shared_memory(y_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    ring = (x_ring, w_ring, full, empty)
    gl.warp_specialize(
        [
            (multiply_tiles, (
                y_desc, bias_ptr, bits_ptr, ring, y_buffers, M, N, K, stride_bias, bytes_n,
                DROPOUT, BY_N, RANK_STEPS, BLOCK_R, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )),
            (load_tiles, (
                x_desc, w_desc, s_desc, u_desc, ring, M, N, K,
                BY_N, RANK_STEPS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )),
        ],
        [1],
        [LOADING_REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, w: Tensor, u: Tensor) -> bool:
    """Whether there is a kernel for x (M, K), w (K, N) and u (R, N), of which descriptors can show x and w."""
    rows = u if u.stride(1) == 1 else u.t()
    alike = u.dtype == x.dtype and gemm.rows_by_n(u) == gemm.rows_by_n(w)  # U is loaded the way W is
    return x.dtype in DTYPES and alike and u.shape[0] % 8 == 0 and gemm.shown(rows)


def launch(
    target: Target, x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, u: Tensor, bits: Tensor | None, y: Tensor,
    tile: Tile,
) -> Launch:  # fmt: skip
    """`gemm.gemm_launch` by this kernel; the mask is read from bits."""
    (M, K), (R, N) = x.shape, u.shape
    by_n = gemm.rows_by_n(w)
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    across = [block_n, block_k] if by_n else [block_k, block_n]
    args = {
        "x_desc": _described(x, [block_m, block_k]), "w_desc": _described(w.t() if by_n else w, across),
        "s_desc": _described(s, [block_m, block_k]), "u_desc": _described(u.t() if by_n else u, across),
        "y_desc": _described(y, [block_m, block_n // 4]), "bias_ptr": bias, "bits_ptr": bits, "M": M, "N": N, "K": K,
        "stride_bias": 0 if bias is None else bias.stride(0), "bytes_n": 0 if bits is None else bits.stride(0),
        "DROPOUT": 0 if bits is None else STORED.value, "BY_N": by_n, "RANK_STEPS": triton.cdiv(R, block_k),
        "BLOCK_R": min(tiles.padded_rank(R), block_k), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "GROUP_M": tile.group_m, "STAGES": tile.num_stages,
    }  # fmt: skip
    programs = min(triton.cdiv(M, block_m) * triton.cdiv(N, block_n), tiles.multiprocessors(x.device, target))
    return Launch(gemm_ws_kernel, (programs,), args, tile.options)


def _described(t: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[t.dtype])
    return TensorDescriptor(t, t.shape, t.stride(), block, layout)
