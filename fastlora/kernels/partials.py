"""Deterministic sums of partial results: out = sum over p of partials[p], in the order of p, without atomics.

Floor: (P * 4 + out.itemsize) * size bytes at the copy bandwidth of the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.launch import Launch

BLOCK = 256
_BLOCKS = {"BLOCK": BLOCK, "BLOCK_P": 8}


@triton.jit
def _sum_block(partials_ptr, out_ptr, block, P, size, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_p = tl.arange(0, BLOCK_P)
    mask = offs < size
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK_P):
        ptrs = partials_ptr + (start + offs_p).to(tl.int64)[:, None] * size + offs[None, :]
        acc += tl.sum(tl.load(ptrs, mask=(start + offs_p < P)[:, None] & mask[None, :], other=0.0), 0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(partials_ptr, out_ptr, P, size, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    _sum_block(partials_ptr, out_ptr, tl.program_id(0), P, size, BLOCK, BLOCK_P)


@triton.jit
def sum_pair_kernel(
    partials0_ptr, out0_ptr, P0, size0, partials1_ptr, out1_ptr, P1, size1, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Two sums in one launch: the first cdiv(size0, BLOCK) programs make out0, the others out1."""
    block = tl.program_id(0)
    blocks0 = tl.cdiv(size0, BLOCK)
    if block < blocks0:
        _sum_block(partials0_ptr, out0_ptr, block, P0, size0, BLOCK, BLOCK_P)
    else:
        _sum_block(partials1_ptr, out1_ptr, block - blocks0, P1, size1, BLOCK, BLOCK_P)


def sum_launch(partials: torch.Tensor, out: torch.Tensor) -> Launch:
    """out = partials.sum(0), cast; `partials` float32 (P, ...) and `out` (...) both contiguous."""
    size = out.numel()
    args = {"partials_ptr": partials, "out_ptr": out, "P": partials.shape[0], "size": size}
    return Launch(sum_kernel, (triton.cdiv(size, BLOCK),), args | _BLOCKS, {"num_warps": 4})


def sum_pair_launch(partials0: torch.Tensor, out0: torch.Tensor, partials1: torch.Tensor, out1: torch.Tensor) -> Launch:
    """Two sums in one launch."""
    size0, size1 = out0.numel(), out1.numel()
    args = {
        "partials0_ptr": partials0, "out0_ptr": out0, "P0": partials0.shape[0], "size0": size0,
        "partials1_ptr": partials1, "out1_ptr": out1, "P1": partials1.shape[0], "size1": size1,
    }  # fmt: skip
    grid = (triton.cdiv(size0, BLOCK) + triton.cdiv(size1, BLOCK),)
    return Launch(sum_pair_kernel, grid, args | _BLOCKS, {"num_warps": 4})
