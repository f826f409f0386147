"""Deterministic sums of partial results: out = sum over p of partials[p], in the order of p, without atomics.

Floor: (P * 4 + out.itemsize) * size bytes at the copy bandwidth of the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.launch import Launch

BLOCK = 256
SUMS = 4  # sums of a launch: five spill on sm_90


@triton.jit
def _sum(partials_ptr, out_ptr, P, size, block, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Block `block` of one sum, if it has one; the block's number within the sums that follow."""
    blocks = tl.cdiv(size, BLOCK)
    if (block >= 0) & (block < blocks):
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        offs_p = tl.arange(0, BLOCK_P)
        mask = offs < size
        acc = tl.zeros([BLOCK], tl.float32)
        for start in range(0, P, BLOCK_P):
            ptrs = partials_ptr + (start + offs_p).to(tl.int64)[:, None] * size + offs[None, :]
            acc += tl.sum(tl.load(ptrs, mask=(start + offs_p < P)[:, None] & mask[None, :], other=0.0), 0)
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    return block - blocks


@triton.jit
def sum_kernel(
    partials0_ptr, out0_ptr, P0, size0, partials1_ptr, out1_ptr, P1, size1, partials2_ptr, out2_ptr, P2, size2,
    partials3_ptr, out3_ptr, P3, size3, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Up to SUMS sums in one launch: the first cdiv(size0, BLOCK) programs make out0, the next ones out1, ..."""
    block = _sum(partials0_ptr, out0_ptr, P0, size0, tl.program_id(0), BLOCK, BLOCK_P)
    if partials1_ptr is not None:
        block = _sum(partials1_ptr, out1_ptr, P1, size1, block, BLOCK, BLOCK_P)
    if partials2_ptr is not None:
        block = _sum(partials2_ptr, out2_ptr, P2, size2, block, BLOCK, BLOCK_P)
    if partials3_ptr is not None:
        _sum(partials3_ptr, out3_ptr, P3, size3, block, BLOCK, BLOCK_P)


def sum_launches(*sums: tuple[torch.Tensor, torch.Tensor]) -> list[Launch]:
    """out = partials.sum(0), cast, of each (partials, out): float32 (P, ...) and (...), both contiguous."""
    found = []
    for first in range(0, len(sums), SUMS):
        args, blocks = {}, 0
        for i in range(SUMS):
            partials, out = sums[first + i] if first + i < len(sums) else (None, None)
            P, size = (None, None) if out is None else (partials.shape[0], out.numel())
            args |= {f"partials{i}_ptr": partials, f"out{i}_ptr": out, f"P{i}": P, f"size{i}": size}
            blocks += triton.cdiv(size or 0, BLOCK)
        found.append(Launch(sum_kernel, (blocks,), args | {"BLOCK": BLOCK, "BLOCK_P": 8}, {"num_warps": 4}))
    return found
