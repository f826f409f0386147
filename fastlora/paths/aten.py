"""Path `torch`: ATen's own GEMMs with nothing computed twice. The floor under every other path.

Forward:   Y = X Wᵀ + bias;  S = drop(X)·Aᵀ;  Y += s·S·Bᵀ in place.
Backward:  dB = s·(Sᵀ·dY)ᵀ;  dS = s·dY·B;  dA = dSᵀ·drop(X);  dX = drop'(dS·A);  dX += dY·W in place.

The scaling s rides on GEMMs as their alpha: no pass of its own. Without dropout dX = dY·W comes first. With it each
direction drops in one pass by a Triton kernel where that runs, from one seed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastlora.paths.mask import drop, keep_mask
from fastlora.paths.path import Path
from fastlora.paths.problem import Update, base_product, cast, rows


def forward(x, weight, bias, update) -> tuple[Tensor, Tensor]:
    if update.lora_A.dtype is torch.float64 and x.dtype is not torch.float64:  # whose range is all of the reference's
        y, S = forward(*_double(x, weight, bias), _double_update(update))
        return y.to(x.dtype), S.to(x.dtype)
    x2, y = rows(x), base_product(x, weight, bias)
    lora_A, lora_B, scaling, p, seed, bank = update
    if p > 0.0:
        x2 = drop(seed, update.chance, x2)
    left = 1.0 if bank else s_factor(scaling, p, x.device)
    if bank:
        S = bank.masked(torch.mm(x2, cast(lora_A, x.dtype).t()))
    elif x.is_cpu:
        S = torch.mm(x2, cast(lora_A, x.dtype).t())
    else:
        S = _product(x2, cast(lora_A, x.dtype).t(), _kept(p) * scaling)
    _add_product(rows(y), S, cast(lora_B, x.dtype).t(), left)
    return y, S


def backward(dy, x, weight, S, update, need_B):
    if update.lora_A.dtype is torch.float64 and dy.dtype is not torch.float64:
        dx, dA, dB = backward(*_double(dy, x, weight, S), _double_update(update), need_B)
        return None if dx is None else dx.to(dy.dtype), dA, dB
    lora_A, lora_B, scaling, p, seed, bank = update
    if (dy.stride(1) != 1 and dy.stride(0) != 1) or 0 in dy.stride():
        dy = dy.contiguous()  # y.sum().backward() hands out an expanded scalar, and three GEMMs would each copy it
    kept = 1.0 if bank else _kept(p)
    dx = dA = dB = None
    if need_B:
        factor = 1.0 if bank else s_factor(scaling, p, dy.device)
        dB = _product(S.t(), dy, factor).t() if dy.is_cpu else _product(dy.t(), S, factor)
    if weight is None and x is None:
        return dx, dA, dB
    dS = _product(dy, cast(lora_B, dy.dtype), scaling)
    dS = bank.masked(dS) if bank else dS
    x = None if x is None else rows(x)
    if p > 0.0:
        dx = None if weight is None else _product(dS, cast(lora_A, dy.dtype), kept)
        x = drop(seed, update.chance, x, dx)
    if x is not None:
        dA = torch.mm(dS.t(), x) if p == 0.0 else _product(dS.t(), x, kept)
    if weight is not None:
        dx = torch.mm(dy, weight).addmm_(dS, cast(lora_A, dy.dtype)) if dx is None else dx.addmm_(dy, weight)
    return dx, dA, dB


def s_factor(scaling: float, p: float, device: torch.device) -> float:
    """On a CPU S holds neither scaling nor dropout's factor, so that 16 bits overflow where eager's do; on a GPU both,
    as every path's there does: backward may be another's."""
    return scaling * _kept(p) if device.type == "cpu" else 1.0


def _kept(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _double(*tensors: Tensor | None):
    return (None if t is None else t.double() for t in tensors)


def _double_update(update: Update) -> Update:
    return update._replace(lora_A=update.lora_A.double(), lora_B=update.lora_B.double())


def _rides_on_gemm(scaling: float) -> bool:
    """Whether BLAS takes the factor as its alpha: at one that float32 holds as 0 it would look at no operand and lose
    its NaN, and one beyond float32 it refuses."""
    return 1e-37 < abs(scaling) < 1e37


def _product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * (a @ b), rounded once and without a pass of its own for the factor."""
    if not _rides_on_gemm(scaling):
        return torch.mm(a, b).mul_(scaling)
    return torch.addmm(_nothing(a.dtype, a.device), a, b, beta=0, alpha=scaling)


def _add_product(y: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """y += scaling * (a @ b)."""
    if _rides_on_gemm(scaling):
        y.addmm_(a, b, alpha=scaling)
    else:
        y.add_(torch.mm(a, b).mul_(scaling))


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((), dtype=dtype, device=device)  # with beta = 0 nobody looks at it


PATH = Path("torch", lambda device, problem: None, forward, backward, keep_mask, s_factor)
