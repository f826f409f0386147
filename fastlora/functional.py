"""`lora_linear`: the layer as a function, its autograd, and the registered ops that a compiler sees.

What is kept for backward, and why only that: `x` (the caller's own tensor), because dA = dSᵀ·drop(x) needs it, and
S = drop(x)·lora_Aᵀ of shape (M, R), scaled where the path scales it, because dB = dYᵀ·S needs it. With dropout also a
seed of 8 bytes, from which backward regenerates forward's mask. The weights are the caller's parameters. Nothing as
large as y is kept.
"""

from __future__ import annotations

from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastlora import reference
from fastlora.dispatch import cpu, registry, select
from fastlora.dispatch.choice import TINY, is_tiny
from fastlora.dispatch.problem import rows
from fastlora.errors import warn_once

_PLAIN = frozenset({Tensor, Parameter})
TWICE = (
    "fastlora.lora_linear gives no gradient of its gradient (a double backward); "
    "fastlora.reference.lora_linear does, at eager's cost"
)


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
        weight: (N, K), x's dtype, frozen.
        lora_A: (R, K); x's dtype or another (float32 under a 16-bit base, say); its gradient has its own dtype.
        lora_B: (N, R); as lora_A.
        bias: (N,) in x's dtype, or None.
        scaling: multiplies the update: a float, or a tensor of one element (no gradient flows to it).
        dropout_p: probability, in [0, 1], that an element of x is dropped from the update; resolved to 1/65536.
        training: False turns dropout off.
        path: forces one of `fastlora.paths()`; None (and no FASTLORA_PATH) chooses by measurement.

    Returns:
        (..., N) in x's dtype; a fresh tensor, never a view. A gradient of its gradient is an error, but where a small
        layer on a CPU runs in ATen's own autograd nodes; so is a batch of gradients made under create_graph=True.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; the message names it.
        RuntimeError: the forced path cannot run here; the message says why.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    if isinstance(scaling, Tensor):
        lora_B, scaling = _scaled(lora_B, scaling), 1.0
    if not training:
        dropout_p = 0.0
    # A mode that sees ATen's operations (a tracer, selective checkpointing) must see ours: the registered op.
    compiling = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if compiling or torch._C._is_any_autocast_enabled():
        x, weight, bias = _autocast(x, weight, bias)
    if path is None and not compiling and _node is not None:
        y = _node.lora_linear(x, weight, lora_A, lora_B, bias, scaling, dropout_p, registry.selected)
        if y is not None:
            return y
    _check(x, weight, lora_A, lora_B, bias, dropout_p)
    if scaling.__class__ is not float:
        if not isinstance(scaling, Real):
            raise TypeError(f"scaling is {type(scaling).__name__}; it needs to be a number or a Tensor of one element")
        scaling = float(scaling)
    if compiling:
        seed = torch.randint(2**63 - 1, (), device=x.device) if dropout_p > 0.0 else None
        return _forward_op(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, path or "")[0]
    if (
        type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or type(lora_A) not in _PLAIN
        or type(lora_B) not in _PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return _as_written(x, weight, lora_A, lora_B, bias, scaling, dropout_p, path)

    if path is None and is_tiny(x, weight, lora_A, scaling, dropout_p):
        return torch.addmm(F.linear(x, weight, bias), F.linear(x, lora_A), lora_B.t(), alpha=scaling)
    # Tensors may have outlived a function transform; ATen's operations see to that themselves.
    x, weight = unwrap_if_dead(x), unwrap_if_dead(weight)
    lora_A, lora_B = unwrap_if_dead(lora_A), unwrap_if_dead(lora_B)
    if bias is not None:
        bias = unwrap_if_dead(bias)
    run = select(x, weight, lora_A, dropout_p, path)
    if run is cpu and _node is not None:  # named, or chosen for the first time
        y = _node.lora_linear(x, weight, lora_A, lora_B, bias, scaling, dropout_p, None)
        if y is not None:
            return y
    if torch.is_grad_enabled():
        if weight.requires_grad:
            weight = _freeze(weight)
        if lora_A.requires_grad or lora_B.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad):
            return _apply(x, weight, lora_A, lora_B, bias, scaling, dropout_p, run)
    seed = run.draw(x, dropout_p) if dropout_p > 0.0 else None
    return run.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)[0]


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
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


def _check(x, weight, lora_A, lora_B, bias, dropout_p) -> None:
    """One expression when all is well: this runs every call."""
    try:
        x_shape, weight_shape, A_shape, B_shape, dtype = x.shape, weight.shape, lora_A.shape, lora_B.shape, x.dtype
        if (
            len(weight_shape) == len(A_shape) == len(B_shape) == 2
            and x_shape
            and x_shape[-1] == weight_shape[1] == A_shape[1]
            and weight_shape[0] == B_shape[0]
            and A_shape[0] == B_shape[1] != 0
            and weight.dtype is dtype
            and dtype.is_floating_point
            and lora_A.dtype.is_floating_point
            and lora_B.dtype is lora_A.dtype
            and (bias is None or (bias.shape == weight_shape[:1] and bias.dtype is dtype))
            and 0.0 <= dropout_p <= 1.0
        ):
            return
    except AttributeError:
        pass  # of what is no tensor
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise TypeError(f"{name} is {type(value).__name__}; it needs to be a Tensor")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they need (..., K) and (N, K)"
        )
    N, K = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] == 0:
        raise ValueError(f"lora_A has shape {tuple(lora_A.shape)}; it needs (R, K) with K = {K} and R >= 1")
    if lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(f"lora_B has shape {tuple(lora_B.shape)}; it needs (N, R) = {(N, lora_A.shape[0])}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it needs (N,) = {(N,)}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it needs to be in [0, 1]")
    for name, tensor in (("x", x), ("lora_A", lora_A)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; it needs a floating dtype")
    if lora_B.dtype is not lora_A.dtype:
        raise TypeError(f"lora_B is {lora_B.dtype} but lora_A is {lora_A.dtype}; they need one dtype")
    name, other = ("weight", weight) if weight.dtype is not x.dtype else ("bias", bias)
    raise TypeError(f"{name} is {other.dtype} but x is {x.dtype}; they need one dtype (or an autocast region)")


def _as_written(x, weight, lora_A, lora_B, bias, scaling, dropout_p, path):
    """Tensor subclasses, function transforms and tracing: the reference serves them, as autograd would."""
    what = (
        "a function transform (vmap, grad, jvp) is active"
        if torch._C._are_functorch_transforms_active()
        else "torch.jit.trace is active"
        if torch._C._get_tracing_state() is not None
        else "forward-mode differentiation is active"
        if forward_ad._current_level >= 0
        else "a tensor subclass was passed: "
        + ", ".join(sorted({type(t).__name__ for t in (x, weight, lora_A, lora_B) if type(t) not in _PLAIN}))
    )
    if path is not None:
        raise RuntimeError(f"path {path!r} cannot run here: {what}")
    warn_once(("as written", what), f"fastlora.lora_linear runs fastlora.reference.lora_linear, since {what}")
    return reference.lora_linear(x, weight, lora_A, lora_B, bias, scaling, dropout_p)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling, dropout_p, run):
        seed = run.draw(x, dropout_p) if dropout_p > 0.0 else None
        y, S = run.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
        need_x, _, need_A, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, weight if need_x else None, lora_A, lora_B, S, seed)
        ctx.call = (scaling, dropout_p, run)
        return y

    @staticmethod
    def backward(ctx, dy):
        scaling, dropout_p, run = ctx.call
        need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        needs, saved = (need_x, need_A, need_B, need_bias), ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.no_grad():
                found = _gradients(dy, *saved, scaling, dropout_p, run, needs)
            found = _once(dy, *saved[:4], found)
        else:
            found = _gradients(dy, *saved, scaling, dropout_p, run, needs)
        dx, dA, dB, dbias = found
        return dx, None, dA, dB, dbias, None, None, None


def _once(dy, x, weight, lora_A, lora_B, found):
    """Gradients under create_graph=True: with an error for who differentiates them by what they depend on."""
    dx, dA, dB, dbias = found
    return (
        _Once.of(dx, dy, lora_A, lora_B),
        _Once.of(dA, dy, x, lora_B),
        _Once.of(dB, dy, x, lora_A, None if x is not None or weight is None else lora_B),  # for an x that is not kept
        _Once.of(dbias, dy),
    )


class _Once(torch.autograd.Function):
    """A gradient that may be used, but not differentiated by the tensors named beside it."""

    @staticmethod
    def of(gradient: Tensor | None, *dependences: Tensor | None) -> Tensor | None:
        learning = [t for t in dependences if t is not None and t.requires_grad]
        if gradient is None or not learning:
            return gradient
        if torch._C._functorch.is_legacy_batchedtensor(gradient):  # whose history would be lost in silence
            raise RuntimeError(TWICE)
        return _Once.apply(gradient, *learning)

    @staticmethod
    def forward(ctx, gradient, *learning):
        return gradient.detach()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(TWICE)


def _gradients(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, run, needs):
    """dx, dA, dB and dbias, each where `needs` asks for it, else None."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, run, needs)
    need_x, need_A, need_B, need_bias = needs
    dy = unwrap_if_dead(dy)
    y_shape = dy.shape
    if len(y_shape) != 2:
        dy = rows(dy)
    backward = run.backward
    if (
        type(dy) not in _PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched=True
        or forward_ad._current_level >= 0
    ):
        backward = partial(_backward_as_written, run)
    dx, dA, dB = backward(
        dy, x if need_A else None, weight if need_x else None, lora_A, lora_B, S, scaling, dropout_p, seed, need_B
    )
    return (
        (dx if len(y_shape) == 2 else dx.view((*y_shape[:-1], dx.shape[-1]))) if need_x else None,
        (dA if dA.dtype is lora_A.dtype else dA.to(lora_A.dtype)) if need_A else None,
        (dB if dB.dtype is lora_B.dtype else dB.to(lora_B.dtype)) if need_B else None,
        dy.sum(0) if need_bias else None,
    )


def _backward_as_written(run, dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, need_B):
    """What `run.backward` computes, for a dy that no kernel can read: a subclass's, or a batch of vmap's."""
    lora_A, lora_B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    dS = dy @ lora_B * scaling
    dx = dA = None
    through, x = dS @ lora_A, None if x is None else rows(x)
    if dropout_p > 0.0:
        with torch._C._DisableFuncTorch():
            kept = run.mask(seed, S.shape[0], lora_A.shape[1], dropout_p).to(dy.dtype)
        kept = kept / (1.0 - dropout_p) if dropout_p < 1.0 else kept
        through, x = through * kept, None if x is None else x * kept
    if weight is not None:
        dx = dy @ weight + through
    if x is not None:
        dA = dS.transpose(-1, -2) @ x
    dB = dy.transpose(-1, -2) @ S * run.s_factor(scaling, dropout_p) if need_B else None
    return dx, dA, dB


# What torch.autograd.Function.apply ends in. The rest is for function transforms, of which none is active where this is
# called (and what they leave behind is unwrapped there); it costs 4 microseconds a call.
_apply = super(torch.autograd.Function, _LoRALinear).apply
# Path `cpu` as a node in C++, where it was built for this torch: it takes ordinary tensors and leaves the rest to us.
_node = cpu.NODE
if _node is not None:
    _node.prepare(cpu.kernels(), cpu, _gradients, TINY, TWICE)


# What a compiler sees. The ops choose their path when they run, so that one graph serves every M. A dispatcher call
# costs several times what the Function above costs, so eager mode never takes this road.


@torch.library.custom_op("fastlora::forward", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    path: str,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, lora_A, lora_B, bias, dropout_p)  # a caller of torch.ops has passed by `lora_linear`
    run = select(x, weight, lora_A, dropout_p, path or None)
    return run.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)


@_forward_op.register_fake
def _(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, path):
    M = rows(x).shape[0]  # symbolic where x's is, so that one graph serves every M
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((M, lora_A.shape[0]))


@torch.library.custom_op("fastlora::backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    path: str,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, lora_A, lora_B, None, dropout_p)
    for name, t, shape in (("dy", dy, (*x.shape[:-1], weight.shape[0])), ("S", S, (rows(x).shape[0], lora_A.shape[0]))):
        if t.shape != shape or t.dtype is not x.dtype:
            raise ValueError(f"{name} is {tuple(t.shape)} {t.dtype}; it needs to be {shape} {x.dtype}")
    run = select(x, weight, lora_A, dropout_p, path or None)
    dx, dA, dB = run.backward(
        rows(dy),
        x if need_A else None,
        weight if need_x else None,
        lora_A,
        lora_B,
        S,
        scaling,
        dropout_p,
        seed,
        need_B,
    )
    return (
        dx.view(x.shape) if need_x else x.new_empty(0),
        dA.to(lora_A.dtype).contiguous() if need_A else lora_A.new_empty(0),
        dB.to(lora_B.dtype).contiguous() if need_B else lora_B.new_empty(0),
    )


@_backward_op.register_fake
def _(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, path, need_x, need_A, need_B):
    return (
        x.new_empty(x.shape if need_x else 0),
        lora_A.new_empty(lora_A.shape if need_A else 0),
        lora_B.new_empty(lora_B.shape if need_B else 0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, lora_A, lora_B, _, scaling, dropout_p, seed, path = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed)
    ctx.call = (scaling, dropout_p, path)
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx, dy, _):
    x, weight, lora_A, lora_B, S, seed = ctx.saved_tensors
    scaling, dropout_p, path = ctx.call
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    dx = dA = dB = None
    if need_x or need_A or need_B:
        dx, dA, dB = torch.ops.fastlora.backward(
            dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, path, need_x, need_A, need_B
        )
    return (
        dx if need_x else None,
        None,
        dA if need_A else None,
        dB if need_B else None,
        rows(dy).sum(0) if need_bias else None,
        None,
        None,
        None,
        None,
    )


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
