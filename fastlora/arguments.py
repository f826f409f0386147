"""What `lora_linear` asks of its arguments, and what it says of one that is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.base_layer import Packed


def check(x, weight, lora_A, lora_B, bias, dropout_p) -> None:
    """Raise TypeError or ValueError unless the arguments fit together; one expression when they do."""
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
    if weight.__class__ is Packed:
        weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
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
