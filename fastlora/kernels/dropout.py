"""The dropout mask: a pure function of (seed, row, column), made again by each kernel but those of dX, which read bits.

    keep[m, k] = bits[m, k] >= round(p * 65536)          drop(X) = keep * X

Kernels know nothing of the factor 1 / (1 - p): it is in the scaling that they are handed, and so in S and dS.

bits[m, k] are 16 of the 128 bits of Philox-4x32 with 7 rounds (Salmon et al. 2011; 7 is the fewest that pass their
statistical battery), keyed by the 64-bit seed, with the counter (k // 8, m, 0, 0): eight consecutive columns share one
call. Row and column sit in separate 32-bit words, so nothing overflows however large M * K is, and no tile size enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fastlora.kernels.bank import is_bank, scale, threshold_of
from fastlora.kernels.launch import Launch
from fastlora.kernels.tiles import Target, target_of

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank

BITS = 65536
# DROPOUT of a kernel, 0 for none: the mask from the seed and a select, from the seed on pairs, from stored bits.
SELECT, PAIRS, STORED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call: `p` in [0, 1], or the bank that knows it for each row, and `seed`, int64 of one element.

    Kernels read the seed by pointer: no host synchronisation, and a captured CUDA graph sees each new value.
    """

    p: float | Bank
    seed: torch.Tensor

    @property
    def rows(self) -> torch.Tensor | None:
        return self.p.rows if is_bank(self.p) else None

    @property
    def threshold(self) -> int | torch.Tensor:
        """What the 16 bits of an element must reach for it to be kept."""
        return self.p.thresholds if is_bank(self.p) else round(self.p * BITS)


def arguments(dropout: Dropout | None, scaling: float | Bank | None = None) -> dict[str, torch.Tensor | float | None]:
    """The arguments `rows_ptr`, `seed_ptr`, `scaling`, if it has one, and `threshold` of a kernel."""
    args = {"rows_ptr": dropout and dropout.rows, "seed_ptr": dropout and dropout.seed}
    if scaling is not None:
        args |= scale(scaling)
    return args | {"threshold": dropout.threshold if dropout else 0}


@triton.jit
def philox(seed, c0, c1, ROUNDS: tl.constexpr):
    """The four words of Philox-4x32 for the counter (c0, c1, 0, 0), uint32, and the 64-bit `seed`.

    As `tl.philox`, but both halves of a product come from one 64-bit multiplication: half of the multiplier's work.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(ROUNDS):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_signs(seed, offs_m, start_k, threshold, BLOCK_K: tl.constexpr):
    """The mask of rows `offs_m` and columns start_k + (0 .. BLOCK_K - 1): four words uint32 [BLOCK_M, BLOCK_K // 8].

    `threshold`: one number, or [BLOCK_M, 1].

    Bits 15 and 31 of a word say whether two neighbouring columns are kept: of 8, words 0 .. 3 hold 0-1, 4-5, 2-3, 6-7.
    `start_k` and BLOCK_K must be multiples of 8. Two halves are compared at once: with the low 15 bits subtracted the
    sign tells of those, and a majority adds the top bits in.
    """
    columns = start_k // 8 + tl.arange(0, BLOCK_K // 8)
    zero = tl.zeros([offs_m.shape[0], BLOCK_K // 8], tl.uint32)
    w0, w1, w2, w3 = philox(seed, zero + columns.to(tl.uint32)[None, :], zero + offs_m.to(tl.uint32)[:, None], 7)
    low = ((threshold & 0x7FFF) * 0x10001).to(tl.uint32)
    below = tl.where(threshold < 32768, 0xFFFFFFFF, 0).to(tl.uint32)
    some = tl.where(threshold < 65536, 0xFFFFFFFF, 0).to(tl.uint32)
    return (
        _majority(w0, low, below) & some,
        _majority(w1, low, below) & some,
        _majority(w2, low, below) & some,
        _majority(w3, low, below) & some,
    )


@triton.jit
def _majority(word, low, below):
    difference = (word | 0x80008000) - low
    return (difference & word) | (below & (difference | word))


@triton.jit
def _by_columns(signs):
    """The words of `keep_signs` in the order of their columns, [BLOCK_M, BLOCK_K // 8, 2, 2].

    A thread holds the eight columns of a call side by side, which is how 16-byte loads of half-precision rows lie: no
    shared memory is needed to apply the mask to such a tile.
    """
    return tl.join(tl.join(signs[0], signs[1]), tl.join(signs[2], signs[3]))


@triton.jit
def keep_of(signs):
    """Keep mask, bool [BLOCK_M, BLOCK_K]."""
    words = _by_columns(signs)
    return tl.reshape(tl.join((words & 0x8000) != 0, (words >> 31) != 0), [signs[0].shape[0], 8 * signs[0].shape[1]])


@triton.jit
def drop(x, signs, DROPOUT: tl.constexpr):
    """x [BLOCK_M, BLOCK_K] with zeros where it is dropped."""
    if DROPOUT == PAIRS:
        words = _by_columns(signs)
        halves = tl.reshape(tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16)), x.shape)
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 keep; prmt.b32 keep, $2, 0, 0xBB99; and.b32 $0, $1, keep; }",  # each half's sign, all over it
            "=r,r,r", [x, halves], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x = tl.where(keep_of(signs), x, 0.0)
    return x


@triton.jit
def bits_of(signs):
    """The mask of eight columns in a byte, the first in the lowest bit: uint8 [BLOCK_M, BLOCK_K // 8]."""
    byte = _pair(signs[0]) | (_pair(signs[2]) << 2) | (_pair(signs[1]) << 4) | (_pair(signs[3]) << 6)
    return byte.to(tl.uint8)


@triton.jit
def _pair(sign):
    return ((sign >> 15) & 1) | ((sign >> 30) & 2)


@triton.jit(do_not_specialize=["threshold"])
def keep_mask_kernel(
    out_ptr, rows_ptr, seed_ptr, threshold, M, K, stride_om,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, K): an element in each byte or, with BITS, eight of them: K is the number of bytes then."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_k = tl.program_id(1) * BLOCK_K
    signs = keep_signs(tl.load(seed_ptr), offs_m, start_k, threshold_of(threshold, rows_ptr, offs_m, M), BLOCK_K)
    if BITS:
        offs_k = start_k // 8 + tl.arange(0, BLOCK_K // 8)
        keep = bits_of(signs)
    else:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        keep = keep_of(signs).to(tl.int8)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_k[None, :]
    tl.store(out_ptrs, keep, mask=(offs_m[:, None] < M) & (offs_k[None, :] < K))


@triton.jit(do_not_specialize=["threshold"])
def drop_kernel(
    x_ptr, out_ptr, u_ptr, rows_ptr, seed_ptr, threshold, M, K, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out = drop(x) and u = drop(u) in place, all (M, K), out and u contiguous; x or u may be None."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_k = tl.program_id(1) * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
    signs = keep_signs(tl.load(seed_ptr), offs_m, start_k, threshold_of(threshold, rows_ptr, offs_m, M), BLOCK_K)
    mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    rows = offs_m.to(tl.int64)[:, None]
    columns = offs_k.to(tl.int64)[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + rows * stride_xm + columns * stride_xk, mask=mask, other=0.0)
        tl.store(out_ptr + rows * K + columns, drop(x, signs, DROPOUT), mask=mask)
    if u_ptr is not None:
        u_ptrs = u_ptr + rows * K + columns
        tl.store(u_ptrs, drop(tl.load(u_ptrs, mask=mask, other=0.0), signs, DROPOUT), mask=mask)


def how(target: Target, dtype: torch.dtype, dropout: Dropout | None) -> int:
    """DROPOUT of a kernel that drops elements of `dtype`."""
    if dropout is None:
        return 0
    return (PAIRS if target.backend == "cuda" and dtype.itemsize == 2 else SELECT).value


def mask_bits(M: int, K: int, device: torch.device) -> torch.Tensor:
    """Room for the mask of (M, K) at a bit an element: uint8 (M, cdiv(K, 8))."""
    return torch.empty(M, triton.cdiv(K, 8), dtype=torch.uint8, device=device)


def mask_launch(dropout: Dropout, out: torch.Tensor, block_m: int = 32, block_k: int = 128) -> Launch:
    """The mask into `out`: int8 (M, K), or `mask_bits`, uint8."""
    M, K = out.shape
    bits = out.dtype is torch.uint8
    args = {
        "out_ptr": out, **arguments(dropout), "M": M, "K": K, "stride_om": out.stride(0),
        "BITS": bits, "BLOCK_M": block_m, "BLOCK_K": block_k,
    }  # fmt: skip
    grid = triton.cdiv(M, block_m), triton.cdiv(8 * K if bits else K, block_k)
    return Launch(keep_mask_kernel, grid, args, {"num_warps": 4})


def keep_mask(dropout: Dropout, M: int, K: int, block_m: int = 32, block_k: int = 128) -> torch.Tensor:
    """The mask that all kernels apply: bool (M, K), True where kept. The blocks change nothing in it."""
    out = torch.empty(M, K, dtype=torch.int8, device=dropout.seed.device)
    mask_launch(dropout, out, block_m, block_k).run()
    return out.view(torch.bool)


def drop_launch(
    target: Target, dropout: Dropout, x: torch.Tensor | None, out: torch.Tensor | None, u: torch.Tensor | None
) -> Launch:
    """out = drop(x) and u = drop(u), of one dtype; either may be None."""
    M, K = (u if x is None else x).shape
    args = {
        "x_ptr": x, "out_ptr": out, "u_ptr": u, **arguments(dropout), "M": M, "K": K,
        "stride_xm": 0 if x is None else x.stride(0), "stride_xk": 0 if x is None else x.stride(1),
        "BLOCK_M": 32, "BLOCK_K": 128, "DROPOUT": how(target, (u if x is None else x).dtype, dropout),
    }  # fmt: skip
    return Launch(drop_kernel, (triton.cdiv(M, 32), triton.cdiv(K, 128)), args, {"num_warps": 4})


def dropped(dropout: Dropout, x: torch.Tensor | None, u: torch.Tensor | None = None) -> torch.Tensor | None:
    """drop(x), a new contiguous tensor, and drop(u) in place, in one launch.

    Args:
        x: (M, K), any dtype and strides, or None.
        u: (M, K), x's dtype, contiguous, or None.
    """
    out = None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    drop_launch(target_of(dropout.seed.device), dropout, x, out, u).run()
    return out
