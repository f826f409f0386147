"""The update alone: what path `hybrid` writes before ATen's GEMM adds to it.

    forward    y  = S Bᵀ + bias          ATen then adds x Wᵀ
    backward   dx = keep * (dS A)        ATen then adds dy W

Floor: M * N * itemsize bytes written at the copy bandwidth, and an eighth of a byte an element of mask read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.dropout import STORED
from fastlora.kernels.gemm import add_rest, add_update, store_part
from fastlora.kernels.launch import Launch
from fastlora.kernels.tiles import Target, Tile


@triton.jit
def up_kernel(
    s_ptr, u_ptr, bias_ptr, bits_ptr, out_ptr, M, N, R,
    stride_sm, stride_sr, stride_ur, stride_un, stride_bias, stride_om,
    DROPOUT: tl.constexpr, RANK_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j) writes tile (i, j) of out: the GEMM's last steps, with nothing before them."""
    start_m = tl.program_id(0) * BLOCK_M
    start_n = tl.program_id(1) * BLOCK_N
    update = (s_ptr, u_ptr, stride_sm, stride_sr, stride_ur, stride_un)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not DROPOUT:
        acc = add_update(
            acc, s_ptr, u_ptr, start_m, start_n, M, N, R, stride_sm, stride_sr, stride_ur, stride_un,
            RANK_STEPS, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
    acc = add_rest(
        acc, start_m, start_n, bias_ptr, stride_bias, update, bits_ptr, M, N, R,
        DROPOUT, RANK_STEPS, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    store_part(acc, out_ptr, start_m, start_n, M, N, stride_om)


def up_launch(
    target: Target, s: Tensor, u: Tensor, bias: Tensor | None, bits: Tensor | None, out: Tensor,
    tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """out (M, N) = keep * (s (M, R) u (R, N)) + bias (N,); out's rows lie side by side."""
    (M, R), N = s.shape, u.shape[1]
    precision = tiles.input_precision(s.dtype, target)
    kind = tiles.kind_of(s.dtype, precision)
    tile = tile or tiles.rank_tiles("up", target, R, kind)[0]
    block_r = min(tiles.padded_rank(R), tiles.rank_block(target, kind))
    args = {
        "s_ptr": s, "u_ptr": u, "bias_ptr": bias, "bits_ptr": bits, "out_ptr": out, "M": M, "N": N, "R": R,
        "stride_sm": s.stride(0), "stride_sr": s.stride(1), "stride_ur": u.stride(0), "stride_un": u.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0), "stride_om": out.stride(0),
        "DROPOUT": 0 if bits is None else STORED.value, "RANK_STEPS": triton.cdiv(R, block_r), "BLOCK_R": block_r,
        "INPUT_PRECISION": precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    return Launch(up_kernel, (triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n)), args, tile.options)


def up(s: Tensor, u: Tensor, bias: Tensor | None, bits: Tensor | None, out: Tensor, tile: Tile | None = None) -> Tensor:
    """out = keep * (s @ u) + bias, accumulated in float32; returns out.

    Args:
        s: (M, R), float16, bfloat16 or float32, any strides; R from 1 to 256.
        u: (R, N), s's dtype or float32, any strides.
        bias: (N,) or None.
        bits: the mask that `grads.da` or `dropout.mask_launch` left, uint8 (M, cdiv(N, 8)); None: nothing is dropped.
        out: (M, N), s's dtype, columns side by side.
        tile: instead of the table's.
    """
    up_launch(tiles.target_of(s.device), s, u, bias, bits, out, tile).run()
    return out
