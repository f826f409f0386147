"""Path `torch`: ATen's own GEMMs with nothing computed twice. What CPUs run, and the floor under every other path.

Forward:   Y = X Wᵀ + bias;  S = drop(X)·Aᵀ;  Y += s·S·Bᵀ in place.
Backward:  dB = s·(Sᵀ·dY)ᵀ;  dS = s·dY·B;  dA = dSᵀ·drop(X);  dX = dY·W;  dX += drop'(dS·A) in place.

The scaling s rides on GEMMs as their alpha: no pass of its own. It stands where eager has it, S without and dS with
s, so that 16 bits overflow and underflow where eager's do.

With dropout the mask is made twice from one seed: 16 random bits an element, on a CPU several times cheaper than
`Tensor.bernoulli_`.
"""

from __future__ import annotations

import math
import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.dispatch.problem import Problem, rides_on_gemm, rows

NAME = "torch"


def unavailable(device: torch.device) -> str | None:
    """Why this path cannot run on `device`; None, since ATen runs wherever torch does."""
    return None


def unsupported(problem: Problem) -> str | None:
    """Why this path cannot run `problem`; None, since ATen takes every floating dtype and shape."""
    return None


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """x (..., K) -> y (..., N), a fresh tensor, and S (M, R) in x's dtype."""
    if lora_A.dtype is torch.float64 and x.dtype is not torch.float64:  # whose range is all of the reference's
        wide = (None if t is None else t.double() for t in (x, weight, lora_A, lora_B, bias))
        y, S = forward(*wide, scaling, dropout_p, seed)
        return y.to(x.dtype), S.to(x.dtype)
    if x.dim() == 2:
        x2, y = x, F.linear(x, weight, bias)
        y2 = y
    else:  # F.linear would return a view here, on which autograd forbids in-place ops
        x2 = rows(x)
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        y2 = y.view(x2.shape[0], weight.shape[0])
        if bias is None:
            torch.mm(x2, weight.t(), out=y2)
        else:
            torch.addmm(bias, x2, weight.t(), out=y2)
    if lora_A.dtype is not x.dtype:
        lora_A = lora_A.to(x.dtype)
    if lora_B.dtype is not x.dtype:
        lora_B = lora_B.to(x.dtype)
    if dropout_p > 0.0:
        keep, scale = keep_mask(seed, x2.shape[0], x2.shape[1], dropout_p, x.dtype)
        S = torch.mm(x2 * keep, lora_A.t())
        scaling = scaling * scale
    else:
        S = torch.mm(x2, lora_A.t())
    _add_product(y2, S, lora_B.t(), scaling)
    return y, S


def backward(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, need_B):
    """dy (M, N) -> dx (M, K), dA (R, K), dB (N, R).

    None for dx when weight is None, for dA when x is None, for dB unless `need_B`.
    """
    if lora_A.dtype is torch.float64 and dy.dtype is not torch.float64:
        wide = (None if t is None else t.double() for t in (dy, x, weight, lora_A, lora_B, S))
        dx, dA, dB = backward(*wide, scaling, dropout_p, seed, need_B)
        return None if dx is None else dx.to(dy.dtype), dA, dB
    if (dy.stride(1) != 1 and dy.stride(0) != 1) or 0 in dy.stride():
        dy = dy.contiguous()  # y.sum().backward() hands out an expanded scalar, and three GEMMs would each copy it
    keep, scale = None, 1.0
    if dropout_p > 0.0:
        keep, scale = keep_mask(seed, dy.shape[0], lora_A.shape[1], dropout_p, dy.dtype)
    dx = dA = dB = None
    if need_B:
        dB = _product(S.t(), dy, scaling * scale).t()
    if weight is None and x is None:
        return dx, dA, dB
    if lora_B.dtype is not dy.dtype:
        lora_B = lora_B.to(dy.dtype)
    dS = _product(dy, lora_B, scaling)
    if x is not None:
        x = rows(x)
        dA = torch.mm(dS.t(), x) if keep is None else _product(dS.t(), x * keep, scale)
    if weight is not None:
        if lora_A.dtype is not dy.dtype:
            lora_A = lora_A.to(dy.dtype)
        dx = torch.mm(dy, weight)
        if keep is None:
            dx.addmm_(dS, lora_A)
        else:
            dx.addcmul_(torch.mm(dS, lora_A), keep, value=scale)
    return dx, dA, dB


def _product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * (a @ b), rounded once and without a pass of its own for the factor."""
    if not rides_on_gemm(scaling):
        return torch.mm(a, b).mul_(scaling)
    return torch.addmm(_nothing(a.dtype, a.device), a, b, beta=0, alpha=scaling)


def _add_product(y: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """y += scaling * (a @ b)."""
    if rides_on_gemm(scaling):
        y.addmm_(a, b, alpha=scaling)
    else:
        y.add_(torch.mm(a, b).mul_(scaling))


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def draw(x: Tensor, dropout_p: float) -> Tensor:
    """What forward and backward make their one mask from: a seed of one element, drawn by torch's generator.

    On a GPU, where ATen cannot regenerate a mask without asking the host, it is the mask itself, one byte an element:
    the one case in which this project keeps a mask.
    """
    if x.is_cuda:
        shape = (x.shape[:-1].numel(), x.shape[-1])
        return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout_p)
    return draw_seed(x.device)


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 and of one element, drawn by torch's generator of `device` and left there."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def s_factor(scaling: float, dropout_p: float) -> float:
    """What dYᵀ·S is to be multiplied by to be dB: S holds neither the scaling nor dropout's factor."""
    return scaling / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def mask(seed: Tensor, M: int, K: int, dropout_p: float) -> Tensor:
    """The dropout mask (M, K), bool, True = kept, that `seed` from `draw` stands for."""
    return keep_mask(seed, M, K, dropout_p, torch.float32)[0].bool()


def keep_mask(seed: Tensor, M: int, K: int, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The mask that `seed` (from `draw` or `draw_seed`) stands for, and the factor for what is kept.

    Returns: 1 where x is kept and 0 where it is dropped, (M, K), in `dtype` or bool, drawn with p to the
    nearest 1/65536; and 1 / (1 - p).
    """
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    if seed.dtype is torch.bool:
        return seed, scale
    words = (M, K // 4) if K % 4 == 0 else ((M * K + 3) // 4,)
    if seed.is_cpu:
        generator = _private.generator.manual_seed(seed.item())
        random = torch.empty(words, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    else:
        random = _splitmix64(seed, words)
    bits = random.view(torch.int16)  # uniform over [-32768, 32768): ATen compares no unsigned 16-bit integers
    if K % 4:
        bits = bits[: M * K].view(M, K)
    least = round(p * 65536) - 32768
    keep = torch.empty((M, K), dtype=dtype, device=seed.device)
    if least > 32767:  # p is 1 to 1/65536, and no 16 bits hold the bound
        return keep.zero_(), scale
    torch.ge(bits, least, out=keep)
    return keep, scale


class _Private(threading.local):
    """Each thread's own generator, seeded anew for every mask: making one costs more than seeding it."""

    def __init__(self) -> None:
        self.generator = torch.Generator()


_private = _Private()


def _splitmix64(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random int64 of `shape` on seed's device, with no word from the host. Source: Steele et al. 2014."""
    z = (
        torch.arange(1, math.prod(shape) + 1, dtype=torch.int64, device=seed.device)
        .mul_(-7046029254386353131)
        .add_(seed)
    )
    z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(-4658895280553007687)
    z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(-7723592293110705685)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1)).view(shape)
