"""`save_adapter` and `load_adapter`: adapters in PEFT's format.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The tensors are named as PEFT names
them: `base_model.model.<layer>.lora_A.weight` and `.lora_B.weight`, and `base_model.model.<module>.<its own
names>` for what is trained in full. No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora import adapter_config
from fastlora.adapter_files import (
    CODES,
    CONFIG_NAME,
    AdapterError,
    TensorFile,
    read_config,
    shown,
    write_adapter,
)
from fastlora.errors import warn_once
from fastlora.inject import attach, tied_modules
from fastlora.linear import FusedLoRALinear
from fastlora.patterns import why_unbounded
from fastlora.targets import AdapterConfig, matched, names, plan, saved_modules

PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | os.PathLike, modules_to_save: Iterable[str] | None = None) -> None:
    """Write the LoRA layers of `model`, and its modules that are trained in full, as an adapter that PEFT loads.

    An adapter already in `directory` is replaced; its other files are not touched. Each file is whole or not there at
    all. Layers put in by hand, without `inject`, are saved as well. A model in DistributedDataParallel or
    `torch.compile` is saved as the model inside. Merged layers are saved as if unmerged. A `scaling` set outright is
    saved as the lora_alpha that gives it, to the last bit or, where no alpha does, to the one next to it. Trainable
    parameters that are not part of the adapter are named in a warning.

    Args:
        model: a model with `FusedLoRALinear` layers.
        directory: made when it is not there.
        modules_to_save: ends of names, as for `inject`; None means those given to `inject`. A list says what is to
            be saved, [] the LoRA layers alone, and no warning follows.

    Raises:
        ValueError: the model has no LoRA layers, is itself one, or holds a tensor that cannot be written: not
            finite, sharded, or without data (on the meta device). Nothing is written.
        AdapterError: (a UserError and a ValueError) `directory` cannot take an adapter: a file, or another's
            adapter.
        WorkError: writing failed; an older adapter there is untouched.
    """
    model = _inner(model)
    layers = _lora_layers(model)
    if not layers or "" in layers:
        what = "has no LoRA layers" if not layers else "is itself a LoRA layer, without a name to save it by"
        raise ValueError(f"model {what}: use fastlora.inject on the model that holds them")
    config = _config_of(model, layers, modules_to_save)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name, module in saved_modules(model, config).items():
        if any(isinstance(part, FusedLoRALinear) for part in module.modules()):
            raise ValueError(f"modules_to_save matches {name!r}, which is or holds a LoRA layer")
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    if modules_to_save is None:
        _name_what_is_left_out(model, layers, tensors)
    for key, tensor in tensors.items():
        _check_writable(key, tensor)

    base_model = getattr(getattr(model, "config", None), "_name_or_path", None)
    fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
    settings = adapter_config.to_json(config, fan_in_fan_out, base_model if isinstance(base_model, str) else None)
    write_adapter(directory, settings, tensors)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Read an adapter written by `save_adapter` or by PEFT into `model`, and return the model.

    A model without LoRA layers gets them first, as the adapter's configuration says; everything else is
    frozen, as by `inject`. They are kept in float32 if the file has float32, else in the weight's dtype. A model that
    has LoRA layers must have them where the adapter has, of the same rank; they take over its scaling.

    Everything is checked before anything is changed: that both files are whole, that all tensors and no
        others are
    there, their shapes, ranks and dtypes, and that every number is finite. Memory is bounded by the size of
    the model's own adapter, whatever the files claim.

    Raises:
        AdapterError: (a UserError and a ValueError) the adapter is missing, damaged or unsupported, or does
            not fit the model; the one line says which tensor or setting, and the model is unchanged.
    """
    outer, model = model, _inner(model)
    where = Path(directory) / CONFIG_NAME
    config = adapter_config.from_json(read_config(directory), where)
    layers = _lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("model has merged LoRA layers: call unmerge() on them first")
    todo = None
    if layers:
        targets, saved = layers, saved_modules(model, config)
        if tied_modules(model, saved.values()):
            raise AdapterError(
                f"{where}: modules_to_save shares parameters in this model: load into one not yet injected"
            )
    else:
        try:
            todo = plan(model, config)
        except ValueError as error:
            raise AdapterError(f"{where} does not fit the model: {error}") from None
        targets, saved, config = todo.targets, todo.saved, todo.config

    with TensorFile(directory) as file:
        wanted = _wanted_shapes(targets, saved, config, layers)
        copies = _base_copies(file, targets)
        _check_names_and_shapes(file, wanted, copies)
        file.check_sum()
        _check_base_copies(file, copies)
        adapter_dtype = _adapter_dtype(file, targets, layers)
        tensors = {key: _read_finite(file, key) for key in wanted}
    for key, (_, held) in wanted.items():
        if held is not None:
            tensors[key] = _as_held(file.path, key, tensors[key], held)

    if todo is not None:
        attach(model, todo, adapter_dtype)
        layers = {name: model.get_submodule(name) for name in targets}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
            layer.set_scaling(config.alpha_of(name), config.use_rslora)
        for name in saved:
            for key, held in model.get_submodule(name).state_dict().items():
                held.copy_(tensors[f"{PREFIX}{name}.{key}"])
    model.fastlora_config = config
    return outer


def _inner(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def _lora_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}


def _config_of(
    model: nn.Module, layers: dict[str, FusedLoRALinear], modules_to_save: Iterable[str] | None
) -> AdapterConfig:
    """The recorded configuration, corrected where the layers say otherwise; they are what is saved."""
    config = getattr(model, "fastlora_config", None)
    if config is None:
        first = next(iter(layers.values()))
        config = AdapterConfig(
            r=Counter(layer.r for layer in layers.values()).most_common(1)[0][0],
            lora_alpha=first.lora_alpha,
            lora_dropout=first.lora_dropout,
            target_modules=tuple(sorted(layers)),
            use_rslora=first.use_rslora,
        )
    if modules_to_save is not None:
        config = dataclasses.replace(config, modules_to_save=names("modules_to_save", modules_to_save))
    all_names = [name for name, _ in model.named_modules()]
    if matched(config, all_names, saved_modules(model, config)) != set(layers) or any(
        why_unbounded(pattern) for pattern in adapter_config.patterns(config)[:2]
    ):
        config = dataclasses.replace(config, target_modules=tuple(sorted(layers)), exclude_modules=())

    ranks, alphas = {}, {}
    for name, layer in layers.items():
        exactly = f"^{re.escape(name)}"
        if config.rank_of(name) != layer.r:
            ranks[exactly] = layer.r
        if _scaling(config.alpha_of(name), layer.r, config.use_rslora) != layer.scaling:
            alphas[exactly] = _alpha_for(layer.scaling, layer.r, config.use_rslora)
    return dataclasses.replace(
        config,
        rank_pattern=ranks | dict(config.rank_pattern),
        alpha_pattern=alphas | dict(config.alpha_pattern),
    )


def _scaling(alpha: float, r: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(r) if use_rslora else r)


def _alpha_for(scaling: float, r: int, use_rslora: bool) -> float:
    """The alpha from which the scaling comes back bit for bit, or the nearest where no alpha gives it."""
    alpha = scaling * (math.sqrt(r) if use_rslora else r)
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda candidate: abs(_scaling(candidate, r, use_rslora) - scaling))


def _name_what_is_left_out(model: nn.Module, layers: dict, tensors: dict) -> None:
    adapters = {id(parameter) for layer in layers.values() for parameter in (layer.lora_A, layer.lora_B)}
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters and PREFIX + name not in tensors
    ]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        warn_once(("left out", *left_out), f"trainable but not in the saved adapter: {left_out[0]}{more}")


def _check_writable(key: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in CODES or tensor.layout is not torch.strided:
        raise ValueError(f"{key} cannot be saved: {getattr(tensor, 'dtype', type(tensor).__name__)} is not supported")
    if tensor.is_meta or type(tensor.data) is not Tensor:
        raise ValueError(f"{key} cannot be saved: it is on the meta device, sharded or quantised")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{key} is not finite: training has diverged, and the adapter is not saved")


def _wanted_shapes(targets, saved, config, layers) -> dict[str, tuple[tuple[int, ...], Tensor | None]]:
    """The tensors that must be in the file: their shapes, and the tensor that is to hold them where there is one."""
    wanted: dict[str, tuple[tuple[int, ...], Tensor | None]] = {}
    for name, module in targets.items():
        if name in layers:
            (n, k), r = module.weight.shape, module.r
            if r != config.rank_of(name):
                raise AdapterError(f"the adapter has rank {config.rank_of(name)} at {name}, the model has rank {r}")
        else:
            (n, k), r = module.weight.shape, config.rank_of(name)
            if not isinstance(module, nn.Linear):
                n, k = k, n
        wanted[f"{PREFIX}{name}.lora_A.weight"] = (r, k), None
        wanted[f"{PREFIX}{name}.lora_B.weight"] = (n, r), None
    for name, module in saved.items():
        for key, held in module.state_dict().items():
            if not isinstance(held, Tensor):
                raise AdapterError(f"modules_to_save matches {name}, whose state {key} is no tensor")
            wanted[f"{PREFIX}{name}.{key}"] = tuple(held.shape), held
    if any(parameter.is_meta for module in (*targets.values(), *saved.values()) for parameter in module.parameters()):
        raise ValueError("model is on the meta device: give its parameters memory first")
    return wanted


def _base_copies(file: TensorFile, targets: dict) -> dict[str, Tensor]:
    """PEFT adds the base weight of an adapted output head: the names of such tensors, and what the model has there."""
    copies = {}
    for name, module in targets.items():
        for part in ("weight", "bias"):
            key, held = f"{PREFIX}{name}.base_layer.{part}", getattr(module, part)
            if key in file.entries and held is not None:
                turned = part == "weight" and getattr(module, "fan_in_fan_out", False)
                copies[key] = held.t() if turned else held
    return copies


def _check_base_copies(file: TensorFile, copies: dict[str, Tensor]) -> None:
    for key, held in copies.items():
        if file.entries[key][1] != tuple(held.shape) or not torch.equal(file.read(key).to(held), held):
            raise AdapterError(f"{file.path}: {key} is another base weight than the model's: it was trained or resized")


def _check_names_and_shapes(file: TensorFile, wanted: dict, copies: dict) -> None:
    missing = [key for key in wanted if key not in file.entries]
    extra = [key for key in file.entries if key not in wanted and key not in copies]
    for keys, what in ((missing, "is missing"), (extra, "has no place in this model")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise AdapterError(f"{file.path}: {shown(keys[0])} {what}{more}")
    for key, (shape, _) in wanted.items():
        if file.entries[key][1] != shape:
            raise AdapterError(f"{file.path}: {key} has shape {file.entries[key][1]}, the model needs {shape}")


def _adapter_dtype(file: TensorFile, targets: dict, layers: dict) -> torch.dtype | None:
    """The dtype for new LoRA layers, None for each weight's own; AdapterError where numbers would be lost."""
    held: list[tuple[str, torch.dtype, torch.dtype]] = []
    for name, module in targets.items():
        for part in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{part}.weight"
            dtype = file.entries[key][0]
            if not dtype.is_floating_point:
                raise AdapterError(f"{file.path}: {key} has dtype {dtype}, which is not floating point")
            held.append((key, dtype, getattr(module, part).dtype if name in layers else module.weight.dtype))
    if not layers and all(dtype is torch.float32 for _, dtype, _ in held):
        return torch.float32
    for wide in (None, torch.float32):
        lost = [item for item in held if not _fits(item[1], wide or item[2])]
        if not lost:
            return wide
        if layers:
            break
    key, dtype, place = lost[0]
    raise AdapterError(f"{file.path}: {key} is {dtype}, which the model's {wide or place} adapter cannot hold exactly")


def _fits(dtype: torch.dtype, place: torch.dtype) -> bool:
    return torch.promote_types(dtype, place) == place


def _read_finite(file: TensorFile, key: str) -> Tensor:
    tensor = file.read(key)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{file.path}: {key} holds numbers that are not finite")
    return tensor


def _as_held(path: Path, key: str, tensor: Tensor, held: Tensor) -> Tensor:
    """`tensor` in the dtype of the model's own tensor: rounded, with a warning, where that is a narrower float."""
    if tensor.dtype == held.dtype:
        return tensor
    if not (tensor.is_floating_point() and held.is_floating_point()):
        raise AdapterError(f"{path}: {key} is {tensor.dtype}, the model needs {held.dtype}")
    rounded = tensor.to(held.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise AdapterError(f"{path}: {key} is {tensor.dtype} and too large for the model's {held.dtype}")
    if not _fits(tensor.dtype, held.dtype):
        warn_once(("rounded", tensor.dtype, held.dtype), f"{key} and others are rounded to the model's {held.dtype}")
    return rounded
