"""The layers that LoRA can be put on, and their base weights: whatever can show itself as (N, K) for one product.

A plain weight is a Tensor and shows itself; a quantised one is a `Packed`. To add a form: `form_of`, `statistics_of`,
`why_not_packed` and `Packed`. No package is imported here: its layers can only be met once it has been.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from fastlora.packed import Packed, dense, recomputed

__all__ = ["DTYPES", "Packed", "base_parameters", "compute_dtype", "dense", "form_of", "is_conv1d", "logical_dtype"]
__all__ += ["packed_of", "recomputed", "statistics_of", "weight_of", "why_not_packed"]
_OF_X = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")  # what torchao's weights do to x
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def base_parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    """(weight, bias, whether the module stores it as (K, N)) of an `nn.Linear`, transformers' `Conv1D`, or a linear
    layer of bitsandbytes or torchao. A plain weight comes as (N, K), a quantised one as the parameter that it is.

    Raises TypeError for any other module, and for weights that are neither plain floating-point parameters nor known.
    """
    kind, transposed, form = type(linear).__name__, is_conv1d(linear), form_of(linear)
    if not (transposed or form or (isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward)):
        raise TypeError(f"linear must be an nn.Linear or transformers' Conv1D, got {kind}")
    if "forward" in linear.__dict__:
        raise TypeError(f"linear has a forward of its own (off-loading hooks, say) that would be lost: {kind}")
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if form:
        reason = why_not_packed(linear)
        if reason is not None:
            raise TypeError(f"linear cannot be used: {reason}")
        return weight, bias, False
    if weight is None or type(weight.data) is not Tensor or weight.dtype not in DTYPES or weight.ndim != 2:
        what = "no plain parameter" if weight is None else f"{type(weight.data).__name__} of {weight.dtype}"
        raise TypeError(f"linear.weight must be a plain 2-D parameter of 16, 32 or 64-bit floats, got {what}")
    return (weight.detach().t() if transposed else weight), bias, transposed


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, which stores its weight as (K, N)."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def form_of(module: nn.Module) -> str | None:
    """How `module`, a linear layer, has its weight quantised: "4bit" or "8bit" of bitsandbytes, "torchao"; or None."""
    bnb = sys.modules.get("bitsandbytes.nn")
    if bnb is not None:
        forward = getattr(type(module), "forward", None)
        if forward is bnb.Linear4bit.forward or forward is bnb.Linear8bitLt.forward:
            return "4bit" if forward is bnb.Linear4bit.forward else "8bit"
    ao = sys.modules.get("torchao.utils")
    if ao is not None and isinstance(module, nn.Linear) and isinstance(module.weight, ao.TorchAOBaseTensor):
        return "torchao"
    return None


def why_not_packed(module: nn.Module) -> str | None:
    """Why a quantised layer's weight cannot show itself as (N, K) now; None if it can."""
    form, state, weight = form_of(module), statistics_of(module), module.weight
    if form == "torchao":
        if type(module).forward is not nn.Linear.forward or type(weight).dequantize is Tensor.dequantize:
            return f"torchao does not dequantise a {type(weight).__name__}"
        changed = next((name for name in _OF_X if getattr(weight, name, None) is not None), None)
        return changed and f"torchao changes x too, by the weight's {changed}: that is not weight-only"
    if form == "8bit" and module.state.has_fp16_weights:
        return "the base weight is kept in 16 bits, and quantised at each call"
    if state is None:
        return (
            "the base weight is quantised when it is moved to its device, and was not yet; call model.to(device) first"
        )
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed the base weight for inference on a CPU"
    N, K = module.out_features, module.in_features
    size, shape = (N * K, weight.shape) if form == "8bit" else ((N * K + 1) // 2, state.shape)
    if tuple(shape) == (N, K) and weight.nbytes == size:
        return None
    return f"sharded, or another's: the base weight is {weight.nbytes} bytes of {tuple(shape)}, not {size} of {(N, K)}"


def statistics_of(module: nn.Module) -> object:
    """What stands beside a quantised weight to make numbers of it. bitsandbytes moves it about."""
    form, weight = form_of(module), module.weight
    if form == "4bit":
        state = getattr(weight, "quant_state", None)
        return module.quant_state if state is None else state
    return (getattr(weight, "SCB", None) if module.state.SCB is None else module.state.SCB) if form == "8bit" else None


def logical_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of what was quantised. bitsandbytes' 8-bit layers do not say: their bias's, or the default."""
    form, bias = form_of(module), module.bias
    if form == "8bit":
        return torch.get_default_dtype() if bias is None else bias.dtype
    return statistics_of(module).dtype if form == "4bit" else module.weight.dtype


def compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which a quantised layer would multiply x itself."""
    if form_of(module) != "4bit":
        return x.dtype
    if not module.compute_type_is_set:  # as its own first call would
        module.set_compute_type(x)
        module.compute_type_is_set = True
    return module.compute_dtype or x.dtype


def packed_of(module: nn.Module, dtype: torch.dtype) -> Packed:
    """The weight of a quantised layer, to be dequantised to `dtype`."""
    shape = torch.Size((module.out_features, module.in_features))
    return Packed(module.weight, form_of(module), statistics_of(module), shape, dtype)


def weight_of(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | Packed, Tensor | None]:
    """x, weight (N, K) and bias of a product: in the dtype that a quantised layer computes in, else as they are."""
    weight, bias = module.weight, module.bias
    if form_of(module) is None:
        return x, weight.t() if is_conv1d(module) else weight, bias
    dtype = compute_dtype(module, x)
    return x.to(dtype), packed_of(module, dtype), None if bias is None else bias.to(dtype)
