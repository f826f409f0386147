"""The dropout mask: a pure function of (seed, row, column) that every kernel regenerates and none stores.

    keep[m, k] = bits[m, k] >= round(p * 65536)          drop(X) = keep * X / (1 - round(p * 65536) / 65536)

bits[m, k] are 16 of the 128 bits of Philox-4x32 with 7 rounds (Salmon et al. 2011; 7 is the fewest that pass their
statistical battery), keyed by the 64-bit seed, with the counter (k // 8, m, 0, 0): eight consecutive columns share one
call. Row and column sit in separate 32-bit words, so nothing overflows however large M * K is, and no tile size enters.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BITS = 65536


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call: `p` in [0, 1] and `seed`, an int64 tensor of one element on the device of x.

    Kernels read the seed by pointer: no host synchronisation, and a captured CUDA graph sees each new value.
    """

    p: float
    seed: torch.Tensor

    @property
    def threshold(self) -> int:
        """What the 16 bits of an element must reach for it to be kept."""
        return round(self.p * BITS)


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
def keep_tile(seed, offs_m, start_k, threshold, BLOCK_K: tl.constexpr):
    """Keep mask, bool [BLOCK_M, BLOCK_K], of rows `offs_m` and columns start_k + (0 .. BLOCK_K - 1).

    `start_k` and BLOCK_K must be multiples of 8. A thread holds the eight columns of a call side by side, which is how
    16-byte loads of half-precision rows lie: no shared memory is needed to apply the mask to such a tile.
    """
    EIGHTHS: tl.constexpr = BLOCK_K // 8
    columns = start_k // 8 + tl.arange(0, EIGHTHS)
    zero = tl.zeros([offs_m.shape[0], EIGHTHS], tl.uint32)
    c0 = zero + columns.to(tl.uint32)[None, :]
    c1 = zero + offs_m.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox(seed, c0, c1, 7)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [BLOCK_M, EIGHTHS, 2, 2]
    low = (words & 0xFFFF).to(tl.int32) >= threshold
    high = (words >> 16).to(tl.int32) >= threshold
    return tl.reshape(tl.join(low, high), [offs_m.shape[0], BLOCK_K])


@triton.jit
def drop_tile(x, seed, offs_m, start_k, threshold, BLOCK_K: tl.constexpr):
    """x [BLOCK_M, BLOCK_K] with zeros where it is dropped; what is kept still wants `keep_scale`."""
    return tl.where(keep_tile(seed, offs_m, start_k, threshold, BLOCK_K), x, 0.0)


@triton.jit
def keep_scale(threshold):
    """1 / (1 - threshold / 65536), the factor of what is kept (finite at p = 1, where nothing is)."""
    return 65536.0 / tl.maximum(65536 - threshold, 1).to(tl.float32)


@triton.jit(do_not_specialize=["threshold"])
def keep_mask_kernel(out_ptr, seed_ptr, threshold, M, K, stride_om, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_k = tl.program_id(1) * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
    keep = keep_tile(tl.load(seed_ptr), offs_m, start_k, threshold, BLOCK_K)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_k[None, :]
    tl.store(out_ptrs, keep.to(tl.int8), mask=(offs_m[:, None] < M) & (offs_k[None, :] < K))


def keep_mask(dropout: Dropout, M: int, K: int, block_m: int = 32, block_k: int = 128) -> torch.Tensor:
    """The mask that all kernels apply: bool (M, K), True where kept. The blocks change nothing in it."""
    out = torch.empty(M, K, dtype=torch.int8, device=dropout.seed.device)
    grid = (triton.cdiv(M, block_m), triton.cdiv(K, block_k))
    keep_mask_kernel[grid](out, dropout.seed, dropout.threshold, M, K, out.stride(0), BLOCK_M=block_m, BLOCK_K=block_k)
    return out.bool()
