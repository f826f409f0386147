"""DoRA: the rows of W + s·B A keep their direction, and get lengths that are learned.

    Y = g ⊙ (X Wᵀ + s · X Aᵀ Bᵀ) + bias        g = magnitude / ‖W + s·B A‖ row by row, the norm without a gradient

B A is never formed: ‖W + s·B A‖² = ‖W‖² + 2s·⟨W Aᵀ, B⟩ + s²·⟨B (A Aᵀ), B⟩, and ‖W‖² is computed once for a weight.
Beside what plain LoRA keeps for backward stands one tensor of Y's size, Y before g: the magnitude's gradient needs it.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.3 for the norm's gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fastlora import functional, reference
from fastlora.base_layer import Packed, dense, recomputed
from fastlora.errors import warn_once
from fastlora.gate import through_ops, why_eager
from fastlora.paths.problem import base_product, rows

_CHUNK = {"cpu": 1 << 18}  # elements that a pass over a large tensor takes at a time: what a core's cache holds
_CHUNK_ELSEWHERE = 1 << 24


class Norms:
    """‖W‖² of the rows of one layer's weight, computed once for each weight and version of it."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: tuple | None = None

    def __reduce__(self) -> tuple:
        return Norms, ()  # a copy makes its own

    def squares(self, weight: Tensor | Packed, W: Tensor, wide: torch.dtype) -> Tensor:
        """(N,) of `wide`; W is `weight` made dense."""
        stored = weight.weight if weight.__class__ is Packed else weight
        owner = stored if stored._base is None else stored._base  # a Conv1D's weight is a new view each time
        key = (stored.data_ptr(), 0 if stored.is_inference() else stored._version, wide)
        held = self.held
        if held is None or held[0]() is not owner or held[1] != key:
            with torch.inference_mode(False):
                held = self.held = (weakref.ref(owner), key, _squares(W, wide))
        return held[2]


def row_norms(weight: Tensor | Packed, lora_A, lora_B, scaling: float, norms: Norms | None = None) -> Tensor:
    """‖W + s·B A‖ of each row, (N,), in float32 at least and without a history."""
    wide = torch.promote_types(torch.float32, torch.promote_types(weight.dtype, lora_A.dtype))
    plain = torch.autocast(lora_A.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()
    with torch.no_grad(), plain:
        W, A, B = dense(weight), lora_A.detach().to(wide), lora_B.detach().to(wide)
        cross = torch.empty((W.shape[0], A.shape[0]), dtype=wide, device=W.device)
        for part, out in _pieces(W, cross):
            torch.mm(part.to(wide), A.t(), out=out)
        squares = _squares(W, wide) if norms is None else norms.squares(weight, W, wide)
        # `add_` of a product with an alpha would be wrong in compiled code: inductor of torch 2.13 loses the alpha
        cross = cross.addmm_(B, A @ A.t(), beta=2.0, alpha=scaling).mul_(B).sum(1)
        return cross.mul_(scaling).add_(squares).clamp_(min=0.0).sqrt_()


def fused(
    x: Tensor,
    weight: Tensor | Packed,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    magnitude: Tensor,
    norms: Norms | None,
) -> Tensor | str:
    """Y (..., N) in x's dtype, or why the fused code may not run: a sentence, as from `functional.fused`.

    With dropout the base's product of x stays whole and g sees the dropped x, as in PEFT:
    Y = (X - drop(X)) Wᵀ + bias + g ⊙ (drop(X) Wᵀ + s · drop(X) Aᵀ Bᵀ), two large products each way.

    magnitude (N,) gets a gradient; `norms` is kept by the layer; the rest are as for `lora_linear`.
    """
    compiling = through_ops()
    if weight.__class__ is Packed:  # dequantised once, for the norms and the products
        weight = recomputed(weight) if compiling else weight.once()
    g = magnitude / row_norms(weight, lora_A, lora_B, scaling, None if compiling else norms)
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = functional.cast_for_autocast(x, weight, bias)
    dropped, more = x, bias
    if dropout_p > 0.0:
        dropped = F.dropout(x, dropout_p)
        product = _Frozen.apply if weight.__class__ is Packed else F.linear
        more = product(x - dropped, weight, bias)
    u = functional.fused(dropped, weight, lora_A, lora_B, None, scaling, 0.0)
    if weight.__class__ is Packed:
        weight.made = None  # not kept for backward
    if u.__class__ is str:
        return u
    if compiling:
        y = (u * g).to(u.dtype)
        return y if more is None else y + more
    if torch.is_grad_enabled() and (u.requires_grad or g.requires_grad):
        y = _scale(u, g)
    else:
        y = u.addcmul_(u, (g - 1.0).to(u.dtype))
    return y if more is None else y.add_(more)


def dora_linear(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, magnitude, norms) -> Tensor:
    """`fused`, or where it may not run the reference, said once."""
    y = fused(x, weight, lora_A, lora_B, bias, scaling, dropout_p if training else 0.0, magnitude, norms)
    if y.__class__ is not str:
        return y
    warn_once(("eager", y), f"fastlora.dora runs fastlora.reference.dora_linear, since {y}")
    return eager(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, magnitude, norms)


def eager(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, magnitude, norms=None) -> Tensor:
    """The same by the reference."""
    mask = torch.rand(x.shape, device=x.device) >= dropout_p if training and dropout_p > 0.0 else None
    weight = dense(weight, keep=True)
    return reference.dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling, mask=mask, dropout_p=dropout_p)


class _Scale(torch.autograd.Function):
    """u ⊙ g as u + u ⊙ (g - 1): in 16 bits a g near 1 keeps what the magnitude learned. u is no one's but ours."""

    @staticmethod
    def forward(ctx, u, g):
        ctx.save_for_backward(u, g)
        return torch.addcmul(u, u, (g - 1.0).to(u.dtype))

    @staticmethod
    def backward(ctx, dy):
        u, g = ctx.saved_tensors
        need_u, need_g = ctx.needs_input_grad
        if torch.is_grad_enabled() or why_eager(dy) is not None:
            dims = tuple(range(dy.dim() - 1))
            return dy * g.to(dy.dtype) if need_u else None, (dy * u).sum(dims).to(g.dtype) if need_g else None
        shape, dy, u, less = dy.shape, rows(dy), rows(u), (g - 1.0).to(dy.dtype)
        # u is no one else's, and is needed once, unless backward may come again
        du = torch.empty_like(u) if torch._C._autograd._get_current_graph_task_keep_graph() else u
        dg = torch.zeros_like(g) if need_g else None
        for part, u_part, du_part in _pieces(dy, u, du):
            if need_g:
                dg += (part * u_part).sum(0, dtype=g.dtype)
            if need_u:
                torch.addcmul(part, part, less, out=du_part)
        return du.view(shape) if need_u else None, dg


_scale = super(torch.autograd.Function, _Scale).apply  # past what is for function transforms, see fastlora.autograd


class _Frozen(torch.autograd.Function):
    """x Wᵀ + bias for a W that is dequantised each way and never kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return base_product(x, dense(weight), bias)

    @staticmethod
    def backward(ctx, dy):
        need_x, _, need_bias = ctx.needs_input_grad
        dx = dy @ dense(ctx.weight, keep=torch.is_grad_enabled()) if need_x else None
        return dx, None, rows(dy).sum(0) if need_bias else None


def _squares(W: Tensor, wide: torch.dtype) -> Tensor:
    out = torch.empty(W.shape[0], dtype=wide, device=W.device)
    for part, squares in _pieces(W, out):
        squares.copy_(torch.linalg.vector_norm(part, dim=1, dtype=wide).square_())
    return out


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all, of the first (M, N) at most a chunk's elements at a time; in a graph all of them."""
    rows, columns = tensors[0].shape
    step = max(1, _CHUNK.get(tensors[0].device.type, _CHUNK_ELSEWHERE) // max(1, columns))
    if step >= rows or is_compiling():
        return [tensors]
    return zip(*(t.split(step) for t in tensors), strict=True)
