"""Forward and backward of a path as one autograd node, and what that node keeps: of one projection of x, or of several.

What is kept for backward, and why only that: `x` (the caller's own tensor), because dA = dSᵀ·drop(x) needs it, and
S = drop(x)·lora_Aᵀ of shape (M, R), scaled where the path scales it, because dB = dYᵀ·S needs it. With dropout also a
seed of 8 bytes, from which backward makes forward's mask again. The weights are the caller's parameters, quantised
ones as they are. Nothing as large as y is kept. Several projections keep x once, and S and seed each. Under
create_graph=True the gradients are computed by differentiable formulas instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastlora import node
from fastlora.base_layer import Packed, dense
from fastlora.gate import why_eager
from fastlora.node import NODE
from fastlora.paths import ATEN, PATHS, Path, cpu
from fastlora.paths.bank import Bank
from fastlora.paths.problem import Update, cast, draw_seeds, rows
from fastlora.paths.shared import Needs, Projection

One = tuple[Tensor, Tensor, Tensor, Tensor | None, float]  # weight, lora_A, lora_B, bias, scaling


def run(
    path: Path,
    x: Tensor,
    weight: Tensor | Packed,
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
        y = NODE.lora_linear(path, x, dense(weight), lora_A, lora_B, bias, scaling, dropout_p, packed)
        if y is not None:
            return y
    return _run(path, x, [(weight, lora_A, lora_B, bias, scaling)], dropout_p, bank)[0]


def run_together(path: Path, x: Tensor, projections: Sequence[One], dropout_p: float) -> Sequence[Tensor]:
    """y of each of several projections that share x, likewise."""
    ys = None if NODE is None else NODE.lora_linears(path, x, projections, dropout_p)
    return _run(path, x, projections, dropout_p, None) if ys is None else ys


def _run(path: Path, x: Tensor, projections: Sequence[One], p: float, bank: Bank | None) -> Sequence[Tensor]:
    trained = [t for one in projections for t in one[1:4]]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *trained)):
        return _apply(x, [(one[0], one[4]) for one in projections], p, path, bank, *trained)
    return _forward(path, x, projections, p, bank)[0]


def _forward(path: Path, x: Tensor, projections: Sequence[One], p: float, bank: Bank | None):
    seeds = draw_seeds(x.device, len(projections)) if p > 0.0 else [None] * len(projections)
    many = [
        Projection(dense(weight), bias, Update(lora_A, lora_B, scaling, p, seed, bank))
        for (weight, lora_A, lora_B, bias, scaling), seed in zip(projections, seeds, strict=True)
    ]
    return *node.forward(path, x, many), seeds


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, frozen, p, path, bank, *trained):
        As, Bs, biases = trained[::3], trained[1::3], trained[2::3]
        weights, scalings = zip(*frozen, strict=True)
        ys, Ss, seeds = _forward(path, x, list(zip(weights, As, Bs, biases, scalings, strict=True)), p, bank)
        need_x, _, _, _, _, *needs = ctx.needs_input_grad
        kept = x if any(needs[::3]) else _shadow(x) if need_x and any(needs[1::3]) else None
        ctx.packed = [weight if weight.__class__ is Packed and need_x else None for weight in weights]
        plain = [weight if weight.__class__ is not Packed and need_x else None for weight in weights]
        ctx.save_for_backward(kept, *plain, *As, *Bs, *Ss, *seeds)
        ctx.call = scalings, p, path
        ctx.bank = bank
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        n = len(dys)
        plain, *rest = (saved[i : i + n] for i in range(0, len(saved), n))
        weights = [packed or weight for packed, weight in zip(ctx.packed, plain, strict=True)]
        need_x, _, _, _, _, *needs = ctx.needs_input_grad
        dx, *others = gradients(dys, x, weights, *rest, *ctx.call, (need_x, *needs), ctx.bank)
        return dx, None, None, None, None, *others


# What torch.autograd.Function.apply ends in. The rest is for function transforms, of which none is active where this is
# called (and what they leave behind is unwrapped before); it costs 4 microseconds a call.
_apply = super(torch.autograd.Function, _LoRALinears).apply


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


def gradients(dys, x, weights, As, Bs, Ss, seeds, scalings, p, path, needs, bank=None) -> list[Tensor | None]:
    """dx, then dA, dB and dbias of each projection, where `needs` asks for it (in this order), else None. The node in
    C++ calls this for what it leaves.

    dys: (..., N) of each, None where an output took no part; the next six are what forward kept.
    """
    need_x, need_A, need_B, need_bias = needs[0], needs[1::3], needs[2::3], needs[3::3]
    found: list[Tensor | None] = [None] * len(needs)
    live = [i for i, dy in enumerate(dys) if dy is not None]
    if not live:
        return found
    device = dys[live[0]].device.type
    with torch.autocast(device, enabled=False) if torch._C._is_any_autocast_enabled() else _nothing:
        given = [unwrap_if_dead(dys[i]) for i in live]
        many = [
            Projection(weights[i] if need_x else None, None, Update(As[i], Bs[i], scalings[i], p, seeds[i], bank))
            for i in live
        ]
        if torch.is_grad_enabled() or why_eager(*given) is not None:  # each one's own
            for i, dy, (weight, _, update) in zip(live, given, many, strict=True):
                # not as `needs` says: what is asked for now may be less than what learns
                own = x if x is None or As[i].requires_grad else _shadow(x)
                asked = need_x, need_A[i], need_B[i], need_bias[i]
                dx, *rest = _differentiable(dy, own, weight, Ss[i], update, path, asked)
                found[0] = dx if found[0] is None else found[0] + dx
                found[1 + 3 * i : 4 + 3 * i] = rest
            return found
        flat, needed = [rows(dy) for dy in given], Needs(need_x, *(tuple(n[i] for i in live) for n in (need_A, need_B)))
        many = [one._replace(weight=dense(one.weight)) if need_x else one for one in many]
        kept = [Ss[i] for i in live]
        dx, dAs, dBs = node.backward(path, flat, x if any(needed.A) else None, many, kept, needed, given)
        if need_x:
            found[0] = dx if given[0].dim() == 2 else dx.view((*given[0].shape[:-1], dx.shape[-1]))
        for i, dy, dA, dB in zip(live, flat, dAs, dBs, strict=True):
            found[1 + 3 * i] = cast(dA, As[i].dtype) if need_A[i] else None
            found[2 + 3 * i] = cast(dB, Bs[i].dtype) if need_B[i] else None
            found[3 + 3 * i] = dy.sum(0) if need_bias[i] else None
    return found


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

if NODE is not None:
    NODE.prepare(cpu.kernels(), gradients, tuple(PATHS.values()), list(PATHS).index("cpu"))
