"""What an adapter's tensors must be before any goes into a model: names, shapes, ranks, dtypes, finite numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.adapter_files import CONFIG_NAME, DTYPES, AdapterError, TensorFile, shown
from fastlora.errors import warn_once
from fastlora.linear import FusedLoRALinear
from fastlora.targets import AdapterConfig

PREFIX = "base_model.model."


def check_writable(key: str, tensor: object) -> None:
    """ValueError unless `tensor` can be saved under `key`: dense, with data of its own, finite."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided:
        raise ValueError(f"{key} cannot be saved: {getattr(tensor, 'dtype', type(tensor).__name__)} is not supported")
    if tensor.is_meta or type(tensor.data) is not Tensor:
        raise ValueError(f"{key} cannot be saved: it is on the meta device, sharded or quantised")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{key} is not finite: training has diverged, and the adapter is not saved")


def ranks_in(file: TensorFile, config: AdapterConfig) -> dict[str, int]:
    """The layers that the file has tensors for, and their ranks by the shapes of lora_A; one that `config` gives."""
    ranks: dict[str, int] = {}
    for key in file.entries:
        for part in (".lora_A.weight", ".lora_B.weight"):
            if key.startswith(PREFIX) and key.endswith(part):
                ranks[key[len(PREFIX) : -len(part)]] = config.r
    for name in ranks:
        key = f"{PREFIX}{name}.lora_A.weight"
        _, shape = file.entries.get(key, (None, ()))
        if len(shape) == 2:
            ranks[name] = shape[0]
            if shape[0] != config.r and shape[0] not in config.rank_pattern.values():
                raise AdapterError(f"{file.path}: {shown(key)} has rank {shape[0]}; {CONFIG_NAME} gives {config.r}")
    return ranks


def check_named(where: Path, layers: Iterable[str], target_modules: tuple[str, ...]) -> None:
    """AdapterError when there are tensors for a layer that the configuration does not name: PEFT passes it over."""
    for layer in layers:
        if not any(f".{layer}".endswith(f".{name}") for name in target_modules):
            raise AdapterError(f"{where}: target_modules do not name {shown(layer)}, for which there are tensors")


def wanted_shapes(
    targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module], ranks: Mapping[str, int]
) -> dict[str, tuple[tuple[int, ...], Tensor | None]]:
    """The tensors that must be in the file: their shapes, and the tensor that is to hold them where there is one."""
    wanted: dict[str, tuple[tuple[int, ...], Tensor | None]] = {}
    for name, module in targets.items():
        (n, k), r = module.weight.shape, ranks.get(name, 1)
        if isinstance(module, FusedLoRALinear):
            if name in ranks and module.r != r:
                raise AdapterError(f"the adapter has rank {r} at {name}, the model has rank {module.r}")
        elif not isinstance(module, nn.Linear):
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


def base_copies(file: TensorFile, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """PEFT adds the base weight of an adapted output head: the names of such tensors, and what the model has there."""
    copies = {}
    for name, module in targets.items():
        for part in ("weight", "bias"):
            key, held = f"{PREFIX}{name}.base_layer.{part}", getattr(module, part)
            if key in file.entries and held is not None:
                turned = part == "weight" and getattr(module, "fan_in_fan_out", False)
                copies[key] = held.t() if turned else held
    return copies


def check_base_copies(file: TensorFile, copies: Mapping[str, Tensor]) -> None:
    """AdapterError where such a tensor is not the model's own, bit for bit."""
    for key, held in copies.items():
        if file.entries[key][1] != tuple(held.shape) or not torch.equal(file.read(key).to(held), held):
            raise AdapterError(f"{file.path}: {key} is another base weight than the model's: it was trained or resized")


def check_names_and_shapes(file: TensorFile, wanted: Mapping, copies: Mapping) -> None:
    """AdapterError unless the file holds the wanted tensors in their shapes, and no others but `copies`."""
    missing = [key for key in wanted if key not in file.entries]
    extra = [key for key in file.entries if key not in wanted and key not in copies]
    for keys, what in ((missing, "is missing"), (extra, "has no place in this model")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise AdapterError(f"{file.path}: {shown(keys[0])} {what}{more}")
    for key, (shape, _) in wanted.items():
        if file.entries[key][1] != shape:
            raise AdapterError(f"{file.path}: {key} has shape {file.entries[key][1]}, the model needs {shape}")


def adapter_dtype(file: TensorFile, targets: Mapping[str, nn.Module], injected: bool) -> torch.dtype | None:
    """The dtype for new LoRA layers, None for each weight's own; AdapterError where numbers would be lost."""
    held: list[tuple[str, torch.dtype, torch.dtype]] = []
    for name, module in targets.items():
        for part in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{part}.weight"
            dtype = file.entries[key][0]
            if not dtype.is_floating_point:
                raise AdapterError(f"{file.path}: {key} has dtype {dtype}, which is not floating point")
            held.append((key, dtype, getattr(module, part).dtype if injected else module.weight.dtype))
    if not injected and all(dtype is torch.float32 for _, dtype, _ in held):
        return torch.float32
    for wide in (None, torch.float32):
        lost = [item for item in held if not _fits(item[1], wide or item[2])]
        if not lost:
            return wide
        if injected:
            break
    key, dtype, place = lost[0]
    raise AdapterError(f"{file.path}: {key} is {dtype}, which the model's {wide or place} adapter cannot hold exactly")


def _fits(dtype: torch.dtype, place: torch.dtype) -> bool:
    return torch.promote_types(dtype, place) == place


def read_finite(file: TensorFile, key: str) -> Tensor:
    """One tensor; AdapterError where a number of it is not finite."""
    tensor = file.read(key)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{file.path}: {key} holds numbers that are not finite")
    return tensor


def as_held(path: Path, key: str, tensor: Tensor, held: Tensor) -> Tensor:
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
