"""The layers that LoRA can be put on, and what is taken over from them: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def base_parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    """(weight as (N, K), bias, whether the module stores it as (K, N)) of an `nn.Linear` or transformers' `Conv1D`.

    Raises TypeError for any other module, and for weights that are not plain floating-point parameters.
    transformers is never imported: a `Conv1D` can only be met once it has been.
    """
    kind = type(linear).__name__
    transposed = is_conv1d(linear)
    if not transposed and not (isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward):
        raise TypeError(f"linear must be an nn.Linear or transformers' Conv1D, got {kind}")
    if "forward" in linear.__dict__:
        raise TypeError(f"linear has a forward of its own (off-loading hooks, say) that would be lost: {kind}")
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or type(weight.data) is not Tensor or weight.dtype not in DTYPES or weight.ndim != 2:
        what = "no plain parameter" if weight is None else f"{type(weight.data).__name__} of {weight.dtype}"
        raise TypeError(f"linear.weight must be a plain 2-D parameter of 16, 32 or 64-bit floats, got {what}")
    return (weight.detach().t() if transposed else weight), bias, transposed


def dense(weight: Tensor) -> Tensor:
    """A base weight as (N, K) in memory, for the length of one product: whence every path takes its weight."""
    return weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, which stores its weight as (K, N)."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)
