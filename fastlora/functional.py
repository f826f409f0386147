"""`lora_linear`: the layer as a function. Its arguments are checked here, then one of three roads is taken:
the node in C++, `autograd.run` of the path that `choice.select` names, or, for compilers, the registered ops."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastlora import autograd, env, ops, reference
from fastlora.arguments import check
from fastlora.base_layer import Packed, dense, recomputed
from fastlora.choice import select
from fastlora.errors import warn_once
from fastlora.gate import through_ops, why_eager
from fastlora.node import NODE
from fastlora.paths.bank import Bank


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    path: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T`, fused, with a hand-written backward.

    Equivalent to `fastlora.reference.lora_linear`. Gradients flow to lora_A, lora_B, to x and bias when they ask, and
    never to weight. Under autocast x, weight and bias are cast to its dtype; the adapters keep theirs.

    Args:
        x: (..., K); float64, float32, float16 or bfloat16; any strides.
        weight: (N, K), x's dtype, frozen; or a `base_layer.Packed` in the place of one.
        lora_A: (R, K); x's dtype or another (float32 under a 16-bit base, say); its gradient has its own dtype.
        lora_B: (N, R); as lora_A.
        bias: (N,) in x's dtype, or None.
        scaling: multiplies the update: a float, or a tensor of one element (no gradient flows to it).
        dropout_p: probability, in [0, 1], that an element of x is dropped from the update; resolved to 1/65536.
        training: False turns dropout off.
        path: forces one of `fastlora.paths()`; None (and no FASTLORA_PATH) chooses by measurement.

    Returns:
        (..., N) in x's dtype; a fresh tensor, never a view. Its gradients can be differentiated again, at eager's cost.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the message names it.
        RuntimeError: the forced path cannot run here; the message says why.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    y = fused(x, weight, lora_A, lora_B, bias, scaling, dropout_p if training else 0.0, path)
    if y.__class__ is not str:
        return y
    if path is not None:
        raise RuntimeError(f"path {path!r} cannot run here: {y}")
    warn_once(("eager", y), f"fastlora.lora_linear runs fastlora.reference.lora_linear, since {y}")
    return reference.lora_linear(x, dense(weight, keep=True), lora_A, lora_B, bias, scaling, dropout_p, training)


def fused(x, weight, lora_A, lora_B, bias, scaling, dropout_p, path=None, bank=None) -> Tensor | str:
    """y as `lora_linear` gives it; or, for tensors that the fused code may not see, why: a sentence."""
    compiling = through_ops()
    if path is None and not compiling:
        path = env.forced_path()
    if isinstance(scaling, Tensor):
        lora_B, scaling = _scaled(lora_B, scaling), 1.0
    if compiling or torch._C._is_any_autocast_enabled():
        x, weight, bias = cast_for_autocast(x, weight, bias)
    if path is None and not compiling and NODE is not None and bank is None:
        y = NODE.lora_linear(None, x, weight, lora_A, lora_B, bias, scaling, dropout_p)
        if y is not None:
            return y
    check(x, weight, lora_A, lora_B, bias, dropout_p)
    if scaling.__class__ is not float:
        if not isinstance(scaling, Real):
            raise TypeError(f"scaling is {type(scaling).__name__}; it needs to be a number or a Tensor of one element")
        scaling = float(scaling)
    packed = weight.__class__ is Packed
    if compiling and bank is not None:
        return "a compiler is at work"
    if compiling:
        return ops.call(x, recomputed(weight), lora_A, lora_B, bias, scaling, dropout_p, path)
    reason = why_eager(x, lora_A, lora_B, *(() if packed else (weight,)))
    if reason is not None:
        return reason
    # Tensors may have outlived a function transform; ATen's operations see to that themselves.
    x, weight = unwrap_if_dead(x), weight if packed else unwrap_if_dead(weight)
    lora_A, lora_B = unwrap_if_dead(lora_A), unwrap_if_dead(lora_B)
    if bias is not None:
        bias = unwrap_if_dead(bias)
    if weight.requires_grad and torch.is_grad_enabled():
        weight = _freeze(weight)
    path = select(x, weight, lora_A, dropout_p, path, bank=0 if bank is None else max(bank.ranks))
    return autograd.run(path, x, weight, lora_A, lora_B, bias, scaling, dropout_p, bank)


def bank_linear(
    x: Tensor, weight: Tensor | Packed, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, bank: Bank
) -> Tensor:
    """`lora_linear` of several adapters: lora_A (ΣR, K) and lora_B (N, ΣR) hold them side by side, and `bank` says
    which of the rows of x (..., K) are whose."""
    y = fused(x, weight, lora_A, lora_B, bias, 1.0, max(bank.ps), None, bank)
    return _eager_bank(x, weight, lora_A, lora_B, bias, bank) if y.__class__ is str else y


def _eager_bank(x, weight, lora_A, lora_B, bias, bank: Bank) -> Tensor:
    """The same in ATen's differentiable operations, for compilers and function transforms; masks as F.dropout's."""
    x, weight, bias = cast_for_autocast(x, weight, bias)
    weight = dense(weight, keep=True)
    x2 = x.reshape(-1, x.shape[-1]).to(lora_A.dtype)
    if bank.drops:
        x2 = x2 * (torch.rand_like(x2) * 65536 >= bank.thresholds[bank.rows][:, None])
    update = bank.masked(x2 @ lora_A.t()) @ lora_B.t()
    y = torch.nn.functional.linear(x, weight, bias)
    return (y + update.view(y.shape)).to(y.dtype)


def cast_for_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would hand to F.linear on x's device; it leaves float64 alone."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or x.dtype is torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _scaled(lora_B: Tensor, scaling: Tensor) -> Tensor:
    """lora_B times a tensor of one element, in float32 at least: a scaling that 16 bits do not hold is no infinity."""
    if scaling.numel() != 1:
        raise ValueError(f"scaling has shape {tuple(scaling.shape)}; it needs to have one element, or to be a number")
    wide = torch.promote_types(lora_B.dtype, torch.float32)
    return (lora_B.to(wide) * scaling.detach().reshape(()).to(wide)).to(lora_B.dtype)


def _freeze(weight: Tensor) -> Tensor:
    warn_once(
        "weight asks for a gradient",
        "fastlora.lora_linear: weight.requires_grad is True, but weight is frozen here and gets no gradient; "
        "call weight.requires_grad_(False), or fastlora.reference.lora_linear to train it",
    )
    return weight.detach()
