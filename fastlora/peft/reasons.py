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

from fastlora.base_layer import compute_dtype, form_of, why_not_packed

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


def active_name(layer: nn.Module) -> str:
    """The one adapter that is active in `layer`."""
    active = layer._active_adapter
    return active if isinstance(active, str) else next(name for name in active if name in layer.lora_A)


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


def of_routed(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict, names: tuple[str, ...]) -> str | None:
    """Why a call inside `route`, in which the adapters `names` have rows, is not fused; None if it is."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged into the base weight"
    for name in names:
        if name in layer.lora_variant:
            return f"LoRA variant {type(layer.lora_variant[name]).__name__}"
        reason = _of_adapter(layer, name) or of_call(layer, x, args, kwargs, name)
        if reason is not None:
            return reason
    return "the adapters differ in dtype" if len({layer.lora_A[name].weight.dtype for name in names}) > 1 else None


def _of_adapter(layer: nn.Module, name: str) -> str | None:
    base, down, up, drop = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    form = form_of(base)
    for role, module, types in (
        ("base_layer", base, BASES if form is None else (type(base),)),
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
    tensors = {"base weight": base.weight, "lora_A": down.weight, "lora_B": up.weight}
    if name in layer.lora_variant:
        kind, dora = type(layer.lora_variant[name]).__name__, layer.lora_magnitude_vector._modules.get(name)
        if kind != "DoraLinearVariant" or isinstance(layer.scaling[name], Tensor):
            return f"LoRA variant {kind}"
        reason = _of_module("lora_magnitude_vector", dora, (type(dora),))
        if reason is not None:
            return reason
        if dora.weight.device != base.weight.device:
            return f"lora_magnitude_vector is on {dora.weight.device} and the base weight on {base.weight.device}"
        tensors["lora_magnitude_vector"] = dora.weight
    for role, tensor in tensors.items():
        reason = why_not_packed(base) if tensor is base.weight and form else _of_parameter(role, tensor)
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


def of_call(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict, name: str | None = None) -> str | None:
    """Why this call of `layer`, to whose state nothing is to be objected, is not fused; None if it is. `name`: of the
    adapter that it uses, where that is not the active one."""
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
    if _decodes(layer, x):
        return "few rows and no gradient: bitsandbytes multiplies them by the 4 bits themselves"
    return _of_dtypes(layer, x, name or active_name(layer))


def _decodes(layer: nn.Module, x: Tensor) -> bool:
    """Whether a GPU's kernel of bitsandbytes serves the call, with no weight made dense: up to 7 rows, by its rule."""
    few = not torch.is_grad_enabled() and not x.is_cpu and x.shape[:-1].numel() < 8
    return few and form_of(layer.base_layer) == "4bit"


def _of_dtypes(layer: nn.Module, x: Tensor, name: str) -> str | None:
    base = layer.base_layer
    adapter, form = layer.lora_A[name].weight, form_of(base)
    if form is not None and why_not_packed(base) is not None:
        return why_not_packed(base)
    if name in layer.lora_variant:
        reason = _of_parameter("lora_magnitude_vector", layer.lora_magnitude_vector[name].weight)
        if reason is not None:
            return reason
    if not adapter.dtype.is_floating_point or not x.dtype.is_floating_point:
        return f"x is {x.dtype} and the adapter {adapter.dtype}"
    if layer.lora_B[name].weight.dtype != adapter.dtype:
        return "lora_A and lora_B differ in dtype"
    if torch.is_autocast_enabled(x.device.type):
        cast = torch.get_autocast_dtype(x.device.type)
        own = compute_dtype(base, x) if form == "4bit" else x.dtype if form == "torchao" else cast
        return None if own == cast else f"the quantised base computes in {own} and autocast in {cast}"
    if form in (None, "torchao") and x.dtype != base.weight.dtype:
        return f"x is {x.dtype} and the base weight {base.weight.dtype}"
    if x.dtype != adapter.dtype and not layer.cast_input_dtype_enabled:
        return "the cast of x to the adapter's dtype is switched off"
    return None
