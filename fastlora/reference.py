"""The specification: the LoRA linear layer as one would write it in plain PyTorch. Tests know no other truth.

    Y = X Wᵀ + bias + scaling · drop(X) Aᵀ Bᵀ

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", with the names of loralib and PEFT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """The LoRA linear layer, eager and differentiable by autograd in every argument that asks for it.

    Args:
        x: (..., K), floating point.
        weight: (N, K), x's dtype.
        lora_A: (R, K), x's dtype or a wider one; then the update is computed in that dtype, as PEFT does.
        lora_B: (N, R), lora_A's dtype.
        bias: (N,) or None.
        scaling: multiplies the update; a float or a tensor of one element.
        dropout_p: probability with which an element of x is dropped from the update.
        training: False turns dropout off.
        path: accepted and ignored, so that this function can stand in for `fastlora.lora_linear`.
        mask: bool, x's shape, True where x is kept. Used instead of a random draw; the kept are scaled by
            1 / (1 - dropout_p).

    Returns:
        (..., N), in the dtype of `x @ weight.T`.
    """
    base = F.linear(x, weight, bias)
    update = x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype)
    if mask is not None:
        update = update * mask / (1.0 - dropout_p)
    elif training and dropout_p > 0.0:
        update = F.dropout(update, dropout_p)
    update = F.linear(F.linear(update, lora_A), lora_B) * scaling
    return (base + update).to(base.dtype)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """DoRA in plain PyTorch, as PEFT has it: the update's rows are scaled by magnitude / ‖weight + scaling·B A‖, whose
    norm gets no gradient. With a mask the base's own product sees x whole, and the scaled one x dropped.

    Args:
        magnitude: (N,), trained. The others are as for `lora_linear`.

    Returns:
        (..., N), in the dtype of `x @ weight.T`.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation".
    """
    base, wide = F.linear(x, weight, bias), lora_A.dtype
    norm = torch.linalg.norm((weight.to(wide) + scaling * lora_B @ lora_A).detach(), dim=1)
    g = magnitude / norm
    dropped = (x if mask is None else x * mask / (1.0 - dropout_p)).to(wide)
    update = (g - 1.0) * F.linear(dropped, weight.to(wide)) + g * F.linear(F.linear(dropped, lora_A), lora_B) * scaling
    return (base + update).to(base.dtype)
