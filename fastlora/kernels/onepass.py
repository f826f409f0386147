"""y = x Wᵀ + bias + S Bᵀ with S = scaling * drop(x) Aᵀ, in one kernel: small M, K or N, where launches are the cost.

A program owns a BLOCK_M x BLOCK_N tile of y. Each tile of x that it reads serves two products, with W and with A, and
S [BLOCK_M, R] never leaves registers on its way to the tail S Bᵀ. Programs of one row share its S by making it again:
R columns of work for each BLOCK_N, no second launch and no wait. The first column tile writes S for the backward pass.

Floor: (M * K + N * K + M * N + R * (K + N + M)) * itemsize bytes at the device's copy bandwidth (an H200: 4.3 TB/s); at
the shapes this is for, a launch and the latency of cdiv(K, BLOCK_K) dependent steps are more than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.bank import is_bank, scaled, threshold_of
from fastlora.kernels.dropout import Dropout, arguments, drop, how, keep_signs
from fastlora.kernels.launch import Launch
from fastlora.kernels.product import dot
from fastlora.kernels.tiles import Target, Tile

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank


@triton.jit(do_not_specialize=["threshold"])
def onepass_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, y_ptr, s_ptr, rows_ptr, seed_ptr, scaling, threshold, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bias, stride_ar, stride_ak, stride_bn, stride_br,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Neighbouring programs take the row tiles of one column tile, so that they share its W in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    mask_r = offs_r[None, :] < R
    rows = offs_m.to(tl.int64)
    columns = offs_n.to(tl.int64)
    x_rows = x_ptr + rows[:, None] * stride_xm
    w_rows = w_ptr + columns[None, :] * stride_wn
    a_rows = a_ptr + offs_r.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = threshold_of(threshold, rows_ptr, offs_m, M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        steps = (k + offs_k).to(tl.int64)
        mask_k = offs_k < K - k
        x = tl.load(x_rows + steps[None, :] * stride_xk, mask=mask_m & mask_k[None, :], other=0.0)
        w = tl.load(w_rows + steps[:, None] * stride_wk, mask=mask_n & mask_k[:, None], other=0.0)
        a = tl.load(a_rows + steps[:, None] * stride_ak, mask=mask_r & mask_k[:, None], other=0.0)
        acc = dot(x, w, acc, INPUT_PRECISION)
        if DROPOUT:
            x = drop(x, keep_signs(seed, offs_m, k, threshold, BLOCK_K), DROPOUT)
        acc_s = dot(x, a.to(x.dtype), acc_s, INPUT_PRECISION)

    s = scaled(acc_s, scaling, rows_ptr, offs_m, M, R)
    s = tl.where(mask_r, s, 0.0)  # an infinity in x has made NaN of the padding's zeros
    s = s.to(x_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R], rounded as backward will see it
    if tile_n == 0:
        tl.store(s_ptr + rows[:, None] * R + offs_r[None, :], s, mask=mask_m & mask_r)
    b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r.to(tl.int64)[:, None] * stride_br
    b = tl.load(b_ptrs, mask=mask_n & (offs_r[:, None] < R), other=0.0)  # [BLOCK_R, BLOCK_N]
    acc = dot(s, b.to(s.dtype), acc, INPUT_PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def onepass_launch(
    target: Target, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    scaling: float | Bank, dropout: Dropout | None, y: Tensor, S: Tensor, tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """y (M, N) and S (M, R), both contiguous."""
    M, K = x.shape
    N, R = lora_B.shape
    precision = tiles.input_precision(x.dtype, target)
    tile = tile or tiles.rank_tiles("onepass", target, R, tiles.kind_of(x.dtype, precision), is_bank(scaling))[0]
    args = {
        "x_ptr": x, "w_ptr": weight, "bias_ptr": bias, "a_ptr": lora_A, "b_ptr": lora_B, "y_ptr": y, "s_ptr": S,
        **arguments(dropout, scaling), "M": M, "N": N, "K": K,
        "stride_xm": x.stride(0), "stride_xk": x.stride(1), "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1), "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_ar": lora_A.stride(0), "stride_ak": lora_A.stride(1), "stride_bn": lora_B.stride(0),
        "stride_br": lora_B.stride(1),
        "R": R, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "BLOCK_R": tiles.padded_rank(R),
        "DROPOUT": how(target, x.dtype, dropout), "INPUT_PRECISION": precision,
    }  # fmt: skip
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
    return Launch(onepass_kernel, grid, args, tile.options)


def onepass_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float | Bank,
    dropout: Dropout | None, out: Tensor | None = None, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x @ weight.T + bias + S @ lora_B.T and S = scaling * drop(x) @ lora_A.T, accumulated in float32.

    Args:
        x: (M, K), float16, bfloat16 or float32, any strides.
        weight: (N, K), x's dtype, any strides.
        bias: (N,) or None.
        lora_A: (R, K), x's dtype or float32, any strides; R from 1 to 256.
        lora_B: (N, R), likewise.
        scaling: dropout's factor 1 / (1 - p) is in it; or the bank that knows it for each row.
        dropout: None for none.
        out: contiguous (M, N) in x's dtype to write y into, or None for a new tensor.
        tile: instead of the table's.

    Returns:
        y (M, N) and S (M, R), x's dtype, contiguous.
    """
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    S = torch.empty(x.shape[0], lora_A.shape[0], dtype=x.dtype, device=x.device)
    target = tiles.target_of(x.device)
    onepass_launch(target, x, weight, bias, lora_A, lora_B, scaling, dropout, y, S, tile).run()
    return y, S
