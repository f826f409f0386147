"""Projections that share x as one autograd node: `autograd.run` for several of them.

Kept for backward are x once, each S and each seed; see `fastlora.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastlora import autograd, node
from fastlora.gate import why_eager
from fastlora.node import NODE
from fastlora.paths import PATHS, Path, cpu
from fastlora.paths.problem import Update, draw_seeds, rows
from fastlora.paths.shared import SHARED, Needs, Projection

One = tuple[Tensor, Tensor, Tensor, Tensor | None, float]  # weight, lora_A, lora_B, bias, scaling


def run(path: Path, x: Tensor, projections: Sequence[One], p: float) -> tuple[Tensor, ...]:
    """y of each by `path`, differentiable where the arguments ask for it."""
    if NODE is not None:
        ys = NODE.run_shared(path, x, projections, p)
        if ys is not None:
            return ys
    trained = [t for one in projections for t in one[1:4]]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *trained)):
        frozen = [(one[0], one[4]) for one in projections]
        return _LoRALinears.apply(x, frozen, p, path, *trained)
    return tuple(_forward(path, x, projections, p)[0])


def _forward(path: Path, x: Tensor, projections: Sequence[One], p: float):
    seeds = draw_seeds(x.device, len(projections)) if p > 0.0 else [None] * len(projections)
    many = [
        Projection(weight, bias, Update(A, B, scaling, p, seed))
        for (weight, A, B, bias, scaling), seed in zip(projections, seeds, strict=True)
    ]
    return *node.forward_shared(path, SHARED[path.name], x, many), seeds


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, frozen, p, path, *trained):
        groups = [trained[i : i + 3] for i in range(0, len(trained), 3)]  # lora_A, lora_B, bias
        projections = [(weight, *group, scaling) for (weight, scaling), group in zip(frozen, groups, strict=True)]
        ys, Ss, seeds = _forward(path, x, projections, p)
        need_x, _, _, _, *needs = ctx.needs_input_grad
        shadow = need_x and any(needs[1::3])
        kept = x if any(needs[::3]) else autograd._shadow(x) if shadow else None
        weights = [weight if need_x else None for weight, _ in frozen]
        ctx.save_for_backward(kept, *weights, *trained[::3], *trained[1::3], *Ss, *seeds)
        ctx.call = [scaling for _, scaling in frozen], p, path
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        n = len(dys)
        need_x, _, _, _, *needs = ctx.needs_input_grad
        parts = [saved[i : i + n] for i in range(0, len(saved), n)]
        dx, *rest = gradients(dys, x, *parts, *ctx.call, (need_x, *needs))
        return dx, None, None, None, *rest


def gradients(dys, x, weights, lora_As, lora_Bs, Ss, seeds, scalings, p, path, needs) -> list[Tensor | None]:
    """dx, then dA, dB and dbias of each, where `needs` asks for it (in this order). The node in C++ calls this for what
    it leaves.

    dys: (..., N) of each; None where an output took no part.
    """
    need_x, need_A, need_B, need_bias = needs[0], needs[1::3], needs[2::3], needs[3::3]
    found: list[Tensor | None] = [None] * len(needs)
    live = [i for i, dy in enumerate(dys) if dy is not None]
    device = next(dys[i] for i in live).device.type if live else "cpu"
    if not live:
        return found
    with torch.autocast(device, enabled=False) if torch._C._is_any_autocast_enabled() else autograd._nothing:
        dys = {i: unwrap_if_dead(dys[i]) for i in live}
        asked = {i: (need_x, need_A[i], need_B[i], need_bias[i]) for i in live}
        if torch.is_grad_enabled() or why_eager(*dys.values()) is not None or len(live) == 1:
            # what differentiates again, or sees but one of them, is each one's own
            for i in live:
                # not as `needs` says: what is asked for now may be less than what learns
                own = x if x is None or lora_As[i].requires_grad else autograd._shadow(x)
                arguments = dys[i], own, weights[i], lora_As[i], lora_Bs[i], Ss[i], seeds[i], scalings[i], p
                one = autograd.gradients(*arguments, path, asked[i])
                found[0] = one[0] if found[0] is None else found[0] + one[0]
                found[1 + 3 * i : 4 + 3 * i] = one[1:]
            return found
        flat = [rows(dys[i]) for i in live]
        updates = [Update(lora_As[i], lora_Bs[i], scalings[i], p, seeds[i]) for i in live]
        many = [Projection(weights[i] if need_x else None, None, one) for i, one in zip(live, updates, strict=True)]
        needed = Needs(need_x, tuple(need_A[i] for i in live), tuple(need_B[i] for i in live))
        given, kept = [dys[i] for i in live], x if any(needed.A) else None
        dx, dAs, dBs = node.backward_shared(
            path, SHARED[path.name], flat, kept, many, [Ss[i] for i in live], needed, given
        )
        shape = given[0].shape[:-1]
        found[0] = dx.view((*shape, dx.shape[-1])) if need_x else None
        for i, dy, dA, dB in zip(live, flat, dAs, dBs, strict=True):
            found[1 + 3 * i] = dA.to(lora_As[i].dtype) if need_A[i] else None
            found[2 + 3 * i] = dB.to(lora_Bs[i].dtype) if need_B[i] else None
            found[3 + 3 * i] = dy.sum(0) if need_bias[i] else None
    return found


if NODE is not None:
    NODE.prepare(cpu.kernels(), autograd.gradients, gradients, tuple(PATHS.values()), list(PATHS).index("cpu"))
