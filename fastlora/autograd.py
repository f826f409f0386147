"""Forward and backward of a path as one autograd node, and what that node keeps.

What is kept for backward, and why only that: `x` (the caller's own tensor), because dA = dSᵀ·drop(x) needs it, and
S = drop(x)·lora_Aᵀ of shape (M, R), scaled where the path scales it, because dB = dYᵀ·S needs it. With dropout also a
seed of 8 bytes, from which backward makes forward's mask again. The weights are the caller's parameters, quantised
ones as they are. Nothing as large as y is kept. Under create_graph=True the gradients are computed by differentiable
formulas instead.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastlora import node
from fastlora.base_layer import Packed, dense
from fastlora.gate import why_eager
from fastlora.node import NODE
from fastlora.paths import ATEN, Path
from fastlora.paths.bank import Bank
from fastlora.paths.problem import Update, cast, draw_seed, rows


def run(
    path: Path,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    bank: Bank | None = None,
) -> Tensor:
    """y of one call by `path`, differentiable where its arguments ask for it. What eager calls end in."""
    packed = weight if weight.__class__ is Packed else None  # kept for backward in the place of what it makes
    if NODE is not None and bank is None and (packed is None or path is not ATEN):
        y = NODE.run(path, x, dense(weight), lora_A, lora_B, bias, scaling, dropout_p, packed)
        if y is not None:
            return y
    if torch.is_grad_enabled() and (
        lora_A.requires_grad or lora_B.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, lora_A, lora_B, bias, scaling, dropout_p, path, bank)
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    return node.forward(path, x, dense(weight), bias, Update(lora_A, lora_B, scaling, dropout_p, seed, bank))[0]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling, dropout_p, path, bank):
        seed = draw_seed(x.device) if dropout_p > 0.0 else None
        y, S = node.forward(path, x, dense(weight), bias, Update(lora_A, lora_B, scaling, dropout_p, seed, bank))
        need_x, _, need_A, need_B, *_ = ctx.needs_input_grad
        kept = x if need_A else _shadow(x) if need_x and need_B else None
        ctx.packed = weight if weight.__class__ is Packed and need_x else None
        plain = weight if weight.__class__ is not Packed and need_x else None
        ctx.save_for_backward(kept, plain, lora_A, lora_B, S, seed)
        ctx.call, ctx.bank = (scaling, dropout_p, path), bank
        return y

    @staticmethod
    def backward(ctx, dy):
        need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        x, weight, *rest = ctx.saved_tensors
        weight = weight if ctx.packed is None else ctx.packed
        dx, dA, dB, dbias = gradients(dy, x, weight, *rest, *ctx.call, (need_x, need_A, need_B, need_bias), ctx.bank)
        return dx, None, dA, dB, dbias, None, None, None, None


# What torch.autograd.Function.apply ends in. The rest is for function transforms, of which none is active where this is
# called (and what they leave behind is unwrapped before); it costs 4 microseconds a call.
_apply = super(torch.autograd.Function, _LoRALinear).apply


class _Shadow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx, g):
        return g


def _shadow(x: Tensor) -> Tensor:
    """Zeros of x's shape in no memory, with x's history: where lora_A is frozen x itself is not kept, but dB depends
    on it when it is differentiated again."""
    with torch.enable_grad():
        return _Shadow.apply(x)


def gradients(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, path, needs, bank=None):
    """dx, dA, dB and dbias, each where `needs` asks for it, else None. The node in C++ calls this for what it leaves.

    dy (..., N); the next six are what forward kept.
    """
    with torch.autocast(dy.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else _nothing:
        dy, update = unwrap_if_dead(dy), Update(lora_A, lora_B, scaling, dropout_p, seed, bank)
        if torch.is_grad_enabled() or why_eager(dy) is not None:
            return _differentiable(dy, x, weight, S, update, path, needs)
        need_x, need_A, need_B, need_bias = needs
        dy2 = rows(dy)
        weight = dense(weight) if need_x else None
        dx, dA, dB = node.backward(path, dy2, x if need_A else None, weight, S, update, need_B, dy)
        return (
            None if not need_x else dx if dy.dim() == 2 else dx.view((*dy.shape[:-1], dx.shape[-1])),
            cast(dA, lora_A.dtype) if need_A else None,
            cast(dB, lora_B.dtype) if need_B else None,
            dy2.sum(0) if need_bias else None,
        )


def _differentiable(dy, x, weight, S, update, path, needs):
    """The same gradients in ATen's operations: differentiable, and right for a dy that no kernel can read."""
    lora_A, lora_B, scaling, p, seed, bank = update
    need_x, need_A, need_B, need_bias = needs
    shape, dy = dy.shape, rows(dy)
    wide = torch.promote_types(dy.dtype, lora_A.dtype)
    A, B, dy_wide = lora_A.to(wide), lora_B.to(wide), dy.to(wide)
    kept = None
    if p > 0.0:
        with torch._C._DisableFuncTorch():
            kept = path.mask(seed, S.shape[0], lora_A.shape[1], update.chance).to(wide)
        kept = kept / (1.0 - p) if p < 1.0 and bank is None else kept
    dropped = None if x is None else rows(x).to(wide) if kept is None else rows(x).to(wide) * kept
    dS = dy_wide @ B * scaling if bank is None else bank.masked(dy_wide @ B)
    dx = dA = dB = None
    if need_x:
        update_of_x = dS @ A if kept is None else dS @ A * kept
        dx = (dy @ dense(weight, keep=True) + update_of_x.to(dy.dtype)).view((*shape[:-1], lora_A.shape[1]))
    if need_A:
        dA = (dS.transpose(-1, -2) @ dropped).to(lora_A.dtype)
    if need_B:
        scaled = S.detach().to(wide) * (path.s_factor(scaling, p, S.device) if bank is None else 1.0)
        if dropped is not None and torch.is_grad_enabled():  # S again, with its history
            again = dropped @ A.t() * scaling if bank is None else bank.masked(dropped @ A.t())
            # `needs` may be of a call that asks for less; where lora_A is frozen x is a shadow, zero everywhere
            scaled = again if lora_A.requires_grad else scaled + again
        dB = (dy_wide.transpose(-1, -2) @ scaled).to(lora_B.dtype)
    return dx, dA, dB, dy.sum(0) if need_bias else None


_nothing = nullcontext()
