"""`save_adapter` and `load_adapter`: adapters in PEFT's format.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The tensors are named as PEFT names them:
`base_model.model.<layer>.lora_A.weight`, `.lora_B.weight` and, with DoRA, `.lora_magnitude_vector`; and
`base_model.model.<module>.<its own names>` for what is trained in full. No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.adapter_files import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    AdapterError,
    as_held,
    fits,
    read_config,
    read_tensors,
    to_json,
    write_adapter,
)
from fastlora.bank import FusedLoRABank, RoutedCopies
from fastlora.base_layer import form_of, logical_dtype
from fastlora.errors import warn_once
from fastlora.inject import attach, tied_modules
from fastlora.linear import FusedLoRALinear
from fastlora.targets import AdapterConfig, by_pattern, matched, names, plan, saved_modules


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    modules_to_save: Iterable[str] | None = None,
    adapter: str | None = None,
) -> None:
    """Write the LoRA layers of `model`, and its modules that are trained in full, as an adapter that PEFT loads.

    An adapter already in `directory` is replaced, whole or not at all. Layers put in by hand, without `inject`, are
    saved as well, merged ones as if unmerged. A model in DistributedDataParallel or `torch.compile` is saved as the
    model inside. A `scaling` set outright is saved as the lora_alpha that gives it, or the one next to it. Trainable
    parameters that are not part of the adapter are named in a warning.

    Args:
        model: a model with `FusedLoRALinear` layers.
        directory: made when it is not there.
        modules_to_save: ends of names, as for `inject`; None means those given to `inject`. A list says what is to
            be saved, [] the LoRA layers alone, and no warning follows.
        adapter: which, of a model with several (`inject(adapters=...)`).

    Raises:
        ValueError: the model has no LoRA layers, is itself one, or holds a tensor that cannot be written: not finite,
            sharded, or without data (on the meta device). Nothing is written.
        AdapterError: (a UserError and a ValueError) `directory` cannot take an adapter: a file, or another's adapter.
        WorkError: writing failed; an older adapter there is untouched.
    """
    model = _inner(model)
    layers = _lora_layers(model, adapter)
    if not layers or "" in layers:
        what = "has no LoRA layers" if not layers else "is itself a LoRA layer, without a name to save it by"
        raise ValueError(f"model {what}: use fastlora.inject on the model that holds them")
    config = _config_of(model, layers, modules_to_save, adapter)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{PREFIX}{name}.{part}": tensor for part, tensor in _parts(layer).items()}
    for name, module in _saved(model, config, adapter).items():
        if any(isinstance(part, FusedLoRALinear) for part in module.modules()):
            raise ValueError(f"modules_to_save matches {name!r}, which is or holds a LoRA layer")
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    if modules_to_save is None and adapter is None:
        _name_what_is_left_out(model, layers, tensors)
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None)
    fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
    settings = to_json(config, fan_in_fan_out, base_model if isinstance(base_model, str) else None)
    write_adapter(directory, settings, tensors)


def load_adapter(model: nn.Module, directory: str | os.PathLike, adapter: str | None = None) -> nn.Module:
    """Read an adapter written by `save_adapter` or by PEFT into `model`, and return the model.

    A model without LoRA layers gets them first, where the adapter has tensors for them; everything else is frozen, as
    by `inject`. They are kept in float32 if the file has float32, else in the weight's dtype. A model that has LoRA
    layers must have them where the adapter has, of the same rank; they take over its scaling. `adapter` says which, of
    a model with several.

    Layers are found, and ranks and alphas given to them, by PEFT's rules. Everything is checked before anything is
    changed: that both files are whole, that all tensors and no others are there, their shapes and dtypes, and that
    every number is finite. Memory is bounded by the size of the model's own adapter, whatever the files claim.

    Raises:
        AdapterError: (a UserError and a ValueError) the adapter is missing, damaged or unsupported, or does not fit
            the model; the one line says which tensor or setting, and the model is unchanged.
    """
    outer, model = model, _inner(model)
    where, config = Path(directory), read_config(directory)
    layers, todo = _lora_layers(model, adapter), None
    if any(layer.merged for layer in layers.values()):
        raise ValueError("model has merged LoRA layers: call unmerge() on them first")
    try:
        if layers:
            targets, saved = layers, _saved(model, config, adapter)
            if tied_modules(model, saved.values()):
                raise AdapterError(f"{where / CONFIG_NAME}: modules_to_save shares parameters in this model: load into "
                                   "one not yet injected")  # fmt: skip
            ranks = by_pattern("rank_pattern", config.rank_pattern, layers, config.r)
            for name, r in ranks.items():
                if layers[name].use_dora != config.use_dora:
                    raise AdapterError(f"the adapter has use_dora={config.use_dora}, the model's {name} not")
                if r != layers[name].r:
                    raise AdapterError(f"the adapter has rank {r} at {name}, the model has rank {layers[name].r}")
            alphas = by_pattern("alpha_pattern", config.alpha_pattern, layers, config.lora_alpha)
        else:
            todo = plan(model, config)
            targets, saved, config, ranks, alphas = todo.targets, todo.saved, todo.config, todo.ranks, todo.alphas
    except AdapterError:
        raise
    except (ValueError, re.error) as error:
        raise AdapterError(f"{where / CONFIG_NAME} does not fit the model: {error}") from None
    if any(parameter.is_meta for module in (*targets.values(), *saved.values()) for parameter in module.parameters()):
        raise ValueError("model is on the meta device: give its parameters memory first")
    held = {f"{PREFIX}{name}.{key}": t for name, module in saved.items() for key, t in module.state_dict().items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in held.items()}
    copies = {}  # PEFT adds the base weight of an adapted output head
    for name, module in targets.items():
        linear = isinstance(module, nn.Linear | FusedLoRALinear)
        weight = module.weight if linear else module.weight.t()
        N, K = (module.out_features, module.in_features) if linear else weight.shape
        wanted[f"{PREFIX}{name}.lora_A.weight"] = (ranks[name], K)
        wanted[f"{PREFIX}{name}.lora_B.weight"] = (N, ranks[name])
        if config.use_dora:
            wanted[f"{PREFIX}{name}.lora_magnitude_vector"] = (N,)
        copies[f"{PREFIX}{name}.base_layer.weight"] = weight.t() if getattr(module, "fan_in_fan_out", False) else weight
        if module.bias is not None:
            copies[f"{PREFIX}{name}.base_layer.bias"] = module.bias
    tensors = read_tensors(where, wanted, copies)
    dtype = _adapter_dtype(where / WEIGHTS_NAME, tensors, targets)
    tensors |= {key: as_held(where / WEIGHTS_NAME, key, tensors[key], tensor) for key, tensor in held.items()}

    if todo is not None:
        attach(model, {None: todo}, dtype)
        layers = {name: model.get_submodule(name) for name in targets}
    with torch.no_grad():
        for name, layer in layers.items():
            for part, tensor in _parts(layer).items():
                tensor.copy_(tensors[f"{PREFIX}{name}.{part}"])
            layer.set_scaling(alphas[name], config.use_rslora)
        for name, module in _saved(model, config, adapter).items():
            for key, place in module.state_dict().items():
                place.copy_(tensors[f"{PREFIX}{name}.{key}"])
    model.fastlora_config = config if adapter is None else model.fastlora_config | {adapter: config}
    return outer


def _adapter_dtype(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, nn.Module]) -> torch.dtype | None:
    """The dtype for new LoRA layers, None for each weight's own; AdapterError where numbers would be lost.

    float32 where the file has float32, or more than the weight can hold.
    """
    places = {}
    for name, module in targets.items():
        if isinstance(module, FusedLoRALinear):
            place = module.lora_A.dtype
        else:
            place = module.weight.dtype if form_of(module) is None else logical_dtype(module)
        parts = [f"{PREFIX}{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
        places |= {key: place for key in parts if key in tensors}
    dtype = None
    if not any(isinstance(module, FusedLoRALinear) for module in targets.values()):
        kinds = {tensors[key].dtype for key in places}
        if kinds == {torch.float32} or not all(fits(tensors[key].dtype, place) for key, place in places.items()):
            dtype = torch.float32
    for key, place in places.items():
        if not tensors[key].is_floating_point():
            raise AdapterError(f"{path}: {key} has dtype {tensors[key].dtype}, which is not floating point")
        if not fits(tensors[key].dtype, dtype or place):
            what = f"{tensors[key].dtype}, which the model's {dtype or place}"
            raise AdapterError(f"{path}: {key} is {what} adapter cannot hold exactly")
    return dtype


def _parts(layer: FusedLoRALinear) -> dict[str, Tensor]:
    """What is trained in a layer, by PEFT's names."""
    parts = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    return parts | ({"lora_magnitude_vector": layer.lora_magnitude_vector} if layer.use_dora else {})


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


def _lora_layers(model: nn.Module, adapter: str | None) -> dict[str, FusedLoRALinear]:
    """The layers of the model's only adapter, or of the one that is named."""
    banks = {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLoRABank)}
    known = sorted({one for bank in banks.values() for one in bank.adapters})
    if adapter is not None or banks:
        if adapter not in known:
            there = f"the model has {', '.join(known)}" if known else "the model has one without a name"
            raise ValueError(f"adapter is {adapter!r}; {there}" + "; say adapter=..." * (adapter is None))
        return {name: bank.adapters[adapter] for name, bank in banks.items() if adapter in bank.adapters}
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}


def _saved(model: nn.Module, config: AdapterConfig, adapter: str | None) -> dict[str, nn.Module]:
    """The modules trained in full, by name; of several adapters the one's own copies."""
    found = saved_modules(model, config)
    return {n: m.copies[adapter] if isinstance(m, RoutedCopies) else m for n, m in found.items()}


def _config_of(
    model: nn.Module, layers: dict[str, FusedLoRALinear], modules_to_save: Iterable[str] | None, adapter: str | None
) -> AdapterConfig:
    """The recorded configuration, corrected where the layers say otherwise; they are what is saved."""
    config = getattr(model, "fastlora_config", None)
    config = config[adapter] if adapter is not None and config is not None else config
    if config is None:
        first = next(iter(layers.values()))
        config = AdapterConfig(
            r=Counter(layer.r for layer in layers.values()).most_common(1)[0][0],
            lora_alpha=first.lora_alpha,
            lora_dropout=first.lora_dropout,
            target_modules=tuple(sorted(layers)),
            use_rslora=first.use_rslora,
            use_dora=first.use_dora,
        )
    if any(layer.use_dora != config.use_dora for layer in layers.values()):
        raise ValueError(
            "model has LoRA layers with DoRA and without, which PEFT's format does not hold in one adapter"
        )
    if modules_to_save is not None:
        config = dataclasses.replace(config, modules_to_save=names("modules_to_save", modules_to_save))
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        ranks[name], alphas[name] = layer.r, layer.lora_alpha
        if _scaling(alphas[name], layer.r, config.use_rslora) != layer.scaling:
            alphas[name] = _alpha_for(layer.scaling, layer.r, config.use_rslora)
    config = _exactly(config, ranks, alphas)
    every, saved = [name for name, _ in model.named_modules()], saved_modules(model, config)
    every = [name for name in every if name.rpartition(".adapters.")[0] not in layers]
    if matched(config, every, saved) != set(layers):
        config = dataclasses.replace(config, target_modules=tuple(sorted(layers)), exclude_modules=())
    if matched(config, every, saved) != set(layers):  # a name that is also the end of another's
        config = dataclasses.replace(config, target_modules="|".join(re.escape(name) for name in sorted(layers)))
    return config


def _exactly(config: AdapterConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> AdapterConfig:
    """`config` with the layers' own names in the place of every regular expression in a pattern of ranks or alphas."""
    return dataclasses.replace(
        config,
        rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != config.r},
        alpha_pattern={f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def _scaling(alpha: float, r: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(r) if use_rslora else r)


def _alpha_for(scaling: float, r: int, use_rslora: bool) -> float:
    """The alpha from which the scaling comes back bit for bit, or the nearest where no alpha gives it."""
    alpha = scaling * (math.sqrt(r) if use_rslora else r)
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda candidate: abs(_scaling(candidate, r, use_rslora) - scaling))


def _name_what_is_left_out(model: nn.Module, layers: dict, tensors: dict) -> None:
    adapters = {id(parameter) for layer in layers.values() for parameter in _parts(layer).values()}
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters and PREFIX + name not in tensors
    ]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        warn_once(("left out", *left_out), f"trainable but not in the saved adapter: {left_out[0]}{more}")
