"""The gate: may the fused code run for these tensors? Asked once a call, here; the node in C++ has its fast half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})


def why_eager(*tensors: Tensor) -> str | None:
    """Why only ATen's own operations see these tensors right: what is to be said of it, or None.

    Subclasses, function transforms, tracing, forward-mode differentiation and batches of gradients are served by
    differentiable formulas. `fits` in csrc/gate.h asks the same of a call, at the speed of one.
    """
    if torch._C._are_functorch_transforms_active():
        return "a function transform (vmap, grad, jvp) is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    for t in tensors:
        if type(t) not in _PLAIN:
            names = ", ".join(sorted({type(t).__name__ for t in tensors if type(t) not in _PLAIN}))
            return f"a tensor subclass was passed: {names}"
        if torch._C._functorch.is_legacy_batchedtensor(t):
            return "a batch of gradients (is_grads_batched) was passed"
    return None


def through_ops() -> bool:
    """Whether someone watches ATen's operations (a compiler, selective checkpointing) and must see ours: the ops."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
