"""Why PEFT's own forward runs: every case in which the fused function would not compute what PEFT computes.

`of_layer` reads a layer's state and `of_call` one call. Both are slow and complete, and a compiler traces them; the
layer's eager path keeps their verdict for as long as what they read stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

BASES = (nn.Linear, Conv1D)
DROPOUTS = (nn.Identity, nn.Dropout)
SHARDED = "sharded"  # such reasons begin so: inside forward the weights may be other objects than outside it

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dicts, kept by `module` for life, in which its hooks are registered."""
    return tuple(getattr(module, name) for name in _HOOKS)


def of_layer(layer: nn.Module) -> str | None:
    """Why no call of `layer`, in its present state, can be fused; None if a call can."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged into the base weight"
    active = layer._active_adapter
    active = [active] if isinstance(active, str) else active
    present = [name for name in active if name in layer.lora_A]
    if len(present) != 1:
        return "several adapters are active" if present else "no active adapter in this layer"
    return _of_adapter(layer, present[0])


def _of_adapter(layer: nn.Module, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[name]).__name__}"
    if getattr(layer, "quantization_backend", None) is not None:
        return "the base layer is quantised"
    base, down, up, drop = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for role, module, types in (
        ("base_layer", base, BASES),
        ("lora_A", down, (nn.Linear,)),
        ("lora_B", up, (nn.Linear,)),
        ("lora_dropout", drop, DROPOUTS),
    ):
        reason = _of_module(role, module, types)
        if reason is not None:
            return reason
    if type(drop) is nn.Dropout and drop.inplace:
        return "lora_dropout works in place"
    if up.bias is not None or down.bias is not None:
        return "lora_bias: the adapter has a bias"
    for role, tensor in (("base weight", base.weight), ("lora_A", down.weight), ("lora_B", up.weight)):
        reason = _of_parameter(role, tensor)
        if reason is not None:
            return reason
    if base.weight.requires_grad:
        return "the base weight is trainable"
    if base.bias is not None and type(base.bias) is not Parameter:
        return _of_parameter("base bias", base.bias)
    return of_scaling(layer.scaling[name])


def _of_module(role: str, module: nn.Module, types: tuple[type, ...]) -> str | None:
    if "_hf_hook" in module.__dict__:
        return f"{role} is hooked by accelerate (off-loading)"
    if type(module) not in types:
        wanted = " or ".join(t.__name__ for t in types)
        return f"{role} is a {type(module).__module__}.{type(module).__qualname__}, not exactly {wanted}"
    if "forward" in module.__dict__:
        return f"{role}.forward is replaced"
    if any(len(hooks) for hooks in hooks_of(module)):
        return f"{role} has hooks"
    return None


def _of_parameter(role: str, tensor: Tensor | None) -> str | None:
    if hasattr(tensor, "ds_id"):
        return f"{SHARDED}: {role} is a ZeRO-3 parameter"
    if hasattr(tensor, "device_mesh"):
        return f"{SHARDED}: {role} is a {type(tensor).__name__}"
    if type(tensor) is not Parameter:
        return f"{SHARDED} or quantised: {role} is a {type(tensor).__name__}, not a plain parameter"
    return None


def of_scaling(scaling: float | Tensor) -> str | None:
    """Why an adapter's scaling cannot be used; None if it can: a number, or a tensor of no dimension."""
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0:
            return f"scaling has shape {tuple(scaling.shape)}, not that of a scalar"
        if scaling.requires_grad:
            return "scaling asks for a gradient"
    return None


def of_call(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> str | None:
    """Why this call of `layer`, to whose state nothing is to be objected, is not fused; None if it is."""
    if args or kwargs:
        named = [name for name in kwargs if kwargs[name] is not None] or list(kwargs)
        return "called with " + (", ".join(sorted(named)) if named else f"{len(args)} more positional arguments")
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}, not a tensor"
    if is_compiling():
        if torch.compiler.is_exporting():
            return "the model is being exported"
    elif any(len(hooks) for hooks in GLOBAL_HOOKS):
        return "hooks for all modules are registered"
    return _of_dtypes(layer, x)


def _of_dtypes(layer: nn.Module, x: Tensor) -> str | None:
    active = layer._active_adapter
    name = active if isinstance(active, str) else next(name for name in active if name in layer.lora_A)
    weight, adapter = layer.base_layer.weight, layer.lora_A[name].weight
    if not torch.is_autocast_enabled(x.device.type):
        if x.dtype != weight.dtype:
            return f"x is {x.dtype} and the base weight {weight.dtype}"
        if x.dtype != adapter.dtype and not layer.cast_input_dtype_enabled:
            return "the cast of x to the adapter's dtype is switched off"
    if not adapter.dtype.is_floating_point or not x.dtype.is_floating_point:
        return f"x is {x.dtype} and the adapter {adapter.dtype}"
    if layer.lora_B[name].weight.dtype != adapter.dtype:
        return "lora_A and lora_B differ in dtype"
    return None
