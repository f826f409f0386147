"""The registered ops that a compiler sees. They choose their path when they run, so that one graph serves every M.

Where the node in C++ is there, it registers them, and calls what stands here where it knows no plan. A dispatcher call
costs several times what `autograd.run` costs, so eager calls never take this road.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import env, node
from fastlora.arguments import check
from fastlora.base_layer import dense
from fastlora.choice import select
from fastlora.node import NODE
from fastlora.paths.problem import Update, check_saved, draw_seed, rows
from fastlora.paths.shared import Needs, Projection


def call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, path) -> Tensor:
    """y of a call that a compiler, or a mode that watches ATen's operations, sees."""
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    return torch.ops.fastlora.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, path or _named())[0]


def _named() -> str:
    """The path that FASTLORA_PATH names when a graph is made, or ""."""
    return env.forced_path() or ""


_named._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import Dynamo and Triton


def _forward(
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
    check(x, weight, lora_A, lora_B, bias, dropout_p)  # a caller of torch.ops has passed by `lora_linear`
    chosen = select(x, weight, lora_A, dropout_p, path or None)
    update = Update(lora_A, lora_B, scaling, dropout_p, seed)
    (y,), (S,) = node.forward(chosen, x, [Projection(dense(weight), bias, update)])
    return y, S


def _fake_forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, path):
    M = rows(x).shape[0]  # symbolic where x's is, so that one graph serves every M
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((M, lora_A.shape[0]))


def _backward(
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
    chosen = select(x, weight, lora_A, dropout_p, path or None, in_backward=True)
    update, weight = Update(lora_A, lora_B, scaling, dropout_p, seed), dense(weight)
    dy2 = rows(dy)
    check_saved(dy2, x, weight, S, update)
    one, needs = Projection(weight if need_x else None, None, update), Needs(need_x, (need_A,), (need_B,))
    dx, (dA,), (dB,) = node.backward(chosen, [dy2], x if need_A else None, [one], [S], needs, [dy])
    return (
        dx.view(x.shape) if need_x else x.new_empty(0),
        dA.to(lora_A.dtype).contiguous() if need_A else lora_A.new_empty(0),
        dB.to(lora_B.dtype).contiguous() if need_B else lora_B.new_empty(0),
    )


def _fake_backward(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, path, need_x, need_A, need_B):
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


if NODE is None:
    torch.library.custom_op("fastlora::forward", _forward, mutates_args=())
    torch.library.custom_op("fastlora::backward", _backward, mutates_args=())
else:
    NODE.serve(_forward, _backward)
torch.library.register_fake("fastlora::forward", _fake_forward)
torch.library.register_fake("fastlora::backward", _fake_backward)
torch.library.register_autograd("fastlora::forward", _op_backward, setup_context=_setup_context)
