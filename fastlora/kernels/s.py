"""S = scaling * drop(X) Aᵀ, the down projection: x is read once, S (M, R) written in x's dtype.

Floor: (M * K + R * K + M * R) * itemsize bytes at the device's copy bandwidth. An H200 copies 4.3 TB/s, so M = 8192,
K = 4096 in bfloat16 cannot take less than 67 MB / 4.3 TB/s = 16 us. The products, 2 * M * K * R operations, are small
beside it; the mask costs about ten integer instructions for each element of x and may be the longer of the two.

Programs own BLOCK_M rows and run along K. Where M gives too few of them, K is split: each split writes a float32
partial of S, splits * M * R * 4 bytes written and read again, and a second kernel adds them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.dropout import Dropout, drop_tile, keep_scale
from fastlora.kernels.partials import sum_partials
from fastlora.kernels.tiles import input_precision, padded_rank, target_of
from fastlora.kernels.tiles_small import kind_of, s_cut


@triton.jit(do_not_specialize=["threshold"])
def s_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, scaling, threshold, M, K,
    stride_xm, stride_xk, stride_ar, stride_ak, split_k,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALING_POINTER: tl.constexpr, DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i * BLOCK_M .. of out[j], summed over k in j * split_k .. (j + 1) * split_k - 1."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < R
    split = tl.program_id(1)
    start = split * split_k
    end = tl.minimum(start + split_k, K)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(start, end, BLOCK_K):
        mask_k = offs_k < end - k
        columns = (k + offs_k).to(tl.int64)
        x_ptrs = x_rows + columns[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
        a_ptrs = a_rows + columns[:, None] * stride_ak  # [BLOCK_K, BLOCK_R]
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_r & mask_k[:, None], other=0.0)
        if DROPOUT:
            x = drop_tile(x, seed, offs_m, k, threshold, BLOCK_K)
        acc = tl.dot(x, a.to(x.dtype), acc, input_precision=INPUT_PRECISION)
    factor = tl.load(scaling).to(tl.float32) if SCALING_POINTER else scaling
    if DROPOUT:
        factor *= keep_scale(threshold)
    rows = split.to(tl.int64) * M + offs_m
    out = (acc * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * R + offs_r[None, :], out, mask=mask_m & mask_r)


def s_forward(
    x: torch.Tensor, lora_A: torch.Tensor, scaling: float | torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    """S = scaling * drop(x) @ lora_A.T, accumulated in float32.

    Args:
        x: (M, K), float16, bfloat16 or float32, any strides.
        lora_A: (R, K), x's dtype or float32, any strides; R from 1 to 128.
        scaling: a number, or a tensor of one element on x's device, read there.
        dropout: None for none.

    Returns:
        (M, R), x's dtype, contiguous.
    """
    M, K = x.shape
    R = lora_A.shape[0]
    target = target_of(x.device)
    precision = input_precision(x.dtype, target)
    tile, splits, split_k = s_cut(target, M, K, R, kind_of(x.dtype, precision))
    S = torch.empty(M, R, dtype=x.dtype, device=x.device)
    out = S if splits == 1 else torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    s_kernel[(triton.cdiv(M, tile.block_m), splits)](
        x, lora_A, out,
        x if dropout is None else dropout.seed,
        scaling if isinstance(scaling, torch.Tensor) else float(scaling),
        0 if dropout is None else dropout.threshold,
        M, K, x.stride(0), x.stride(1), lora_A.stride(0), lora_A.stride(1), split_k,
        R=R, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=padded_rank(R),
        SCALING_POINTER=isinstance(scaling, torch.Tensor), DROPOUT=dropout is not None,
        INPUT_PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, S)
    return S
