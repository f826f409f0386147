"""Projections that share their input: `lora_linears`, several LoRA linear layers of one x as one autograd node.

An attention's query, key and value read the same x, and so do a gated MLP's gate and up. Computed together they read x
once for all their S, and the gradient of x is summed inside the products that make it, not by autograd afterwards:

    import torch, fastlora

    x = torch.randn(4, 16, 64, requires_grad=True)
    qkv = [
        (torch.randn(n, 64), torch.randn(8, 64, requires_grad=True), torch.zeros(n, 8, requires_grad=True), None, 2.0)
        for n in (64, 32, 32)
    ]
    q, k, v = fastlora.lora_linears(x, qkv, dropout_p=0.1)  # each as fastlora.lora_linear(x, *one, dropout_p=0.1)

Once `fastlora.siblings.on` is set, `inject` and `fastlora.peft.patch` do it by themselves for layers that are seen to
be called with one and the same x (`fastlora.siblings`): the first that is called computes all, the others hand over
theirs. `fastlora.explain` and `fastlora.peft.report` name the group once it was computed. Outputs, gradients and hooks
are those of the layers one by one; masks too on a CPU, on a GPU they are others of the same distribution. One thing
differs: the outputs are one node, whose first backward frees what it kept. So `q.sum().backward(); k.sum().backward()`
needs `retain_graph=True` in the first; better is one backward of both. Dropout costs a mask for each projection, as it
does one by one; path `torch` then also reads x for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastlora import autograd, check_shared, env
from fastlora.arguments import check as check_arguments
from fastlora.autograd import One
from fastlora.base_layer import Packed
from fastlora.choice import nothing_timed, problem_of, select
from fastlora.functional import cast_for_autocast, lora_linear
from fastlora.gate import through_ops, why_eager
from fastlora.node import NODE
from fastlora.paths import PATHS
from fastlora.paths.shared import KERNELS, SHARED, WIDEST, Needs

MOST = 4  # projections of a node, as in csrc/layer.h: Python's road for more would cost more than it saves


def lora_linears(x: Tensor, projections: Sequence[One], dropout_p: float = 0.0, training: bool = True) -> list[Tensor]:
    """`[lora_linear(x, *one, dropout_p, training) for one in projections]`, computed together.

    Args:
        x: (..., K), as for `lora_linear`.
        projections: (weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,) or None, scaling) of each; N and R may
            differ. See `lora_linear` for dtypes.
        dropout_p: probability, in [0, 1], that an element of x is dropped from an update; each has its own mask.
        training: False turns dropout off.

    Returns:
        y (..., N) of each, as `lora_linear` returns it. Where they cannot be computed together (function transforms,
        tensor subclasses, quantised weights, compilers, paths that differ, more than four) each is computed alone.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`.
    """
    ys = together(x, projections, dropout_p if training else 0.0)
    if ys is not None:
        return list(ys)
    _check(projections)
    return [lora_linear(x, *one, dropout_p, training) for one in projections]


def _check(projections: Sequence[One]) -> None:
    for one in projections:
        if not isinstance(one, tuple | list) or len(one) != 5:
            found = f"{len(one)} values" if isinstance(one, tuple | list) else type(one).__name__
            raise TypeError(f"a projection is {found}; it needs to be (weight, lora_A, lora_B, bias or None, scaling)")


def together(x: Tensor, projections: Sequence[One], p: float) -> Sequence[Tensor] | None:
    """y of each, as one autograd node; None where each is to be computed alone."""
    if not 2 <= len(projections) <= MOST or through_ops() or not isinstance(p, Real):
        return None
    p = float(p)
    if torch._C._is_any_autocast_enabled():
        _check(projections)
        x, projections = _cast(x, projections)
    forced = env.forced_path()
    if NODE is not None and forced is None:
        ys = NODE.lora_linears(None, x, projections, p)
        if ys is not None:
            return ys
    name = path_for(x, projections, p, forced)
    return None if name is None else autograd.run_together(PATHS[name], x, projections, p)


def path_for(x: Tensor, projections: Sequence[One], p: float, forced: str | None = None) -> str | None:
    """The path by which these are computed together; None where each is to be computed alone, which also tells of a
    wrong argument."""
    learn = set()
    try:
        for weight, lora_A, lora_B, bias, scaling in projections:
            check_arguments(x, weight, lora_A, lora_B, bias, p)
            tensors = (x, weight, lora_A, lora_B, *(() if bias is None else (bias,)))
            if (
                weight.__class__ is Packed
                or not isinstance(scaling, (float, int))
                or weight.requires_grad
                or (lora_A.dtype is torch.float64 and x.dtype is not torch.float64)
                or any(unwrap_if_dead(t) is not t for t in tensors)
                or any(t.device != x.device for t in tensors)
                or why_eager(*tensors) is not None
            ):
                return None
            learn.add(any(t.requires_grad for t in tensors))
    except (TypeError, ValueError):
        return None
    if len(learn) > 1:  # one node makes one thing of them: what asks for no gradient would seem to
        return None
    chosen = [select(x, one[0], one[1], p, forced) for one in projections]
    names = {(path.whole or path).name for path in chosen}
    if len(names) > 1 and names <= KERNELS:
        names = {"hybrid"}
    name = names.pop()
    if names or name not in SHARED or x.numel() == 0:
        return None
    if name == "torch" and x.is_cuda and NODE is not None:  # which serves each alone, and has no record of all
        return None
    if name in KERNELS and max(one[1].shape[0] for one in projections) > WIDEST:
        return None
    if name in KERNELS and x.is_cuda:
        problems = [problem_of(x, one[0], one[1], p) for one in projections]
        asked = [(one[1].requires_grad, one[2].requires_grad) for one in projections]
        needs = Needs(x.requires_grad, *zip(*asked, strict=True))
        if check_shared.admit(PATHS[name], SHARED[name], problems, needs, bool(nothing_timed())) is not None:
            return None
    if NODE is not None and forced is None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        NODE.choose_shared(PATHS[name], x, projections, p)
    return name


def _cast(x: Tensor, projections: Sequence[One]) -> tuple[Tensor, list[One]]:
    """What autocast would hand to each."""
    cast = [(*cast_for_autocast(x, one[0], one[3]), one) for one in projections]
    return cast[0][0], [(weight, A, B, bias, scaling) for _, weight, bias, (_, A, B, _, scaling) in cast]
