"""Dropout masks of path `torch`: the same on each device however they are made, from the seed alone.

There are four generators of masks in this project: on CPUs torch's own generator (here, for path `torch`) and a hash in
C++ (csrc/cpu_kernels.h, for path `cpu`); on GPUs one function of (seed, row, column), Philox-4x32-7, as a Triton kernel
(kernels/dropout.py, for all paths there) and in ATen's operations (here, where Triton cannot run).
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastlora.paths.bank import Bank


def threshold(p: float) -> int:
    """What 16 random bits must reach for an element to be kept: p to the nearest 1/65536."""
    return round(p * 65536)


def keep_mask(seed: Tensor, M: int, K: int, p: float | Bank, dtype: torch.dtype = torch.bool) -> Tensor:
    """1 where x is kept and 0 where it is dropped, (M, K), on seed's device; bool, or on a CPU `dtype`."""
    if seed.is_cpu:
        return _of_generator(seed, M, K, _least(p), dtype)
    if _kernel_agrees(seed.device, torch.bool):
        from fastlora.paths import gpu

        return gpu.mask(seed, M, K, p)
    return philox_mask(seed, M, K, p)


def drop(seed: Tensor, p: float | Bank, x: Tensor | None, u: Tensor | None = None) -> Tensor | None:
    """x (M, K) with zeros where it is dropped, a new tensor, and the same of u in place; either may be None. Where the
    kernel runs the mask is never written; elsewhere it is made once for both."""
    some = u if x is None else x
    if not seed.is_cpu and _kernel_agrees(seed.device, some.dtype):
        from fastlora.paths import gpu

        return gpu.drop(seed, p, x, u)
    keep = keep_mask(seed, *some.shape, p, some.dtype)
    if keep.dtype is torch.bool:  # on a GPU, where an infinity that is dropped is 0
        gone = ~keep
        if u is not None:
            u.masked_fill_(gone, 0.0)
        return None if x is None else x.masked_fill(gone, 0.0)
    if u is not None:
        u.mul_(keep)
    return None if x is None else x * keep


def _least(p: float | Bank) -> int | Tensor:
    """What 16 random bits must reach: for all rows, or (M, 1)."""
    return threshold(p) if isinstance(p, float) else p.thresholds[p.rows][:, None]


class _Private(threading.local):
    """Each thread's own generator, seeded anew for every mask: making one costs more than seeding it."""

    def __init__(self) -> None:
        self.generator = torch.Generator()


_private = _Private()


def _of_generator(seed: Tensor, M: int, K: int, least: int | Tensor, dtype: torch.dtype) -> Tensor:
    words = (M, K // 4) if K % 4 == 0 else ((M * K + 3) // 4,)
    generator = _private.generator.manual_seed(seed.item())
    bits = torch.empty(words, dtype=torch.int64).random_(-(2**63), None, generator=generator).view(torch.int16)
    bits = bits if K % 4 == 0 else bits[: M * K].view(M, K)
    keep = torch.empty((M, K), dtype=dtype)
    if isinstance(least, Tensor):
        return torch.ge(bits, (least.clamp(max=65535) - 32768).to(torch.int16), out=keep)
    if least > 65535:  # no 16 bits reach it
        return keep.zero_()
    # uniform over [-32768, 32768): ATen compares no unsigned 16-bit integers
    return torch.ge(bits, least - 32768, out=keep)


def philox_mask(seed: Tensor, M: int, K: int, p: float | Bank) -> Tensor:
    """The mask of kernels/dropout.py in ATen's operations, bool (M, K): many passes, and no word from the host."""
    word = 0xFFFFFFFF
    zero = torch.zeros((M, -(-K // 8)), dtype=torch.int64, device=seed.device)
    c0 = zero + torch.arange(zero.shape[1], device=seed.device)
    c1 = zero + torch.arange(M, device=seed.device)[:, None]
    c2, c3, k0, k1 = zero, zero, seed & word, (seed >> 32) & word
    for _ in range(7):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # which wrap: the upper word is right all the same
        c0, c1, c2, c3 = (b >> 32 & word) ^ c1 ^ k0, b & word, (a >> 32 & word) ^ c3 ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    halves = [half for c in (c0, c2, c1, c3) for half in (c & 0xFFFF, c >> 16)]
    return (torch.stack(halves, -1).flatten(1)[:, :K] >= _least(p)).contiguous()


_agrees: dict[tuple[torch.device, torch.dtype], bool] = {}


def _kernel_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel that makes masks (`dtype` bool), or that drops elements of `dtype`, runs on `device`
    and agrees with `philox_mask` to the bit, aligned and not; looked at once."""
    if (device, dtype) not in _agrees:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        try:
            with ThreadPoolExecutor(1) as thread:  # where nobody who watches the call sees it
                looked = [thread.submit(_agrees_at, device, dtype, *sizes) for sizes in ((37, 77), (64, 128))]
            _agrees[device, dtype] = all(one.result() for one in looked)
        except torch.OutOfMemoryError:  # later there may be enough
            return False
        except Exception:  # whatever a missing Triton, a compiler or a driver raises
            _agrees[device, dtype] = False
    return _agrees[device, dtype]


def _agrees_at(device: torch.device, dtype: torch.dtype, M: int, K: int) -> bool:
    from fastlora.paths import gpu

    seed = torch.full((), 0x1234_5678_9ABC_DEF0, device=device)
    keep = philox_mask(seed, M, K, 0.3)
    if dtype is torch.bool:
        return torch.equal(gpu.mask(seed, M, K, 0.3), keep)
    x, u = torch.arange(1, 2 * M * K + 1, device=device).to(dtype).view(2, M, K)
    wanted = x * keep, u * keep
    one, both = gpu.drop(seed, 0.3, x), gpu.drop(seed, 0.3, x, u)
    return torch.equal(one, wanted[0]) and torch.equal(both, wanted[0]) and torch.equal(u, wanted[1])
