"""An adapter's two files in PEFT's format, `adapter_config.json` and `adapter_model.safetensors`: read and written.

What PEFT's configuration asks for and is not supported is refused with its reason, and so are tensors that are not the
wanted ones, before anything is changed. No pickle is read or written.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import UserError, WorkError, shown, warn_once
from fastlora.files import atomic_write, open_regular, read_regular
from fastlora.targets import TASK_HEADS, AdapterConfig

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
MAX_CONFIG = 4 << 20  # bytes
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool)  # fmt: skip

# Settings that change what a LoRA layer computes: an adapter that uses one cannot be loaded as a plain one.
UNSUPPORTED = {
    "lora_bias": "a bias on lora_B",
    "trainable_token_indices": "trainable token embeddings",
    "target_parameters": "adapters on single parameters",
    "layer_replication": "replicated layers",
    "layers_to_transform": "a choice of layers by index",
    "layers_pattern": "a choice of layers by index",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "quantisation-aware LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron layers",
}
# Starts that leave the base weight alone. The others (PiSSA, OLoRA, LoftQ, ...) change it before training.
HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core"),
    *("peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config"),
}


class AdapterError(UserError, ValueError):
    """An adapter's files are missing, damaged or unsupported, or do not fit the model. One line."""


def read_config(directory: str | os.PathLike) -> AdapterConfig:
    """A directory's adapter_config.json; AdapterError where it is missing, malformed or not supported."""
    path = Path(directory) / CONFIG_NAME
    settings = _read_json(path)

    def get(name: str, default, fits: Callable[[object], bool], wanted: str):
        value = settings.get(name)
        value = default if value is None else value
        if not fits(value):
            raise AdapterError(f"{path}: {name} must be {wanted}, got {shown(value)}")
        return tuple(value) if isinstance(value, list) else value

    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {shown(settings.get('peft_type'))}; only LORA adapters can be loaded")
    for name, what in UNSUPPORTED.items():
        if settings.get(name):
            raise AdapterError(f"{path}: the adapter uses {what} ({name}), which is not supported")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{path}: the adapter trains biases (bias={shown(settings['bias'])}), not supported")
    init = settings.get("init_lora_weights")
    if init not in HARMLESS_INIT:
        raise AdapterError(f"{path}: init_lora_weights is {shown(init)}: it belongs to a changed base weight")
    targets = "a list of names or a regular expression"
    config = AdapterConfig(
        r=get("r", 8, _is_rank, "an integer of at least 1"),
        lora_alpha=get("lora_alpha", 8, _is_number, "a finite number"),
        lora_dropout=get("lora_dropout", 0.0, lambda p: _is_number(p) and 0 <= p < 1, "at least 0 and less than 1"),
        target_modules=get("target_modules", [], lambda value: isinstance(value, str) or _is_names(value), targets),
        exclude_modules=get("exclude_modules", [], lambda value: isinstance(value, str) or _is_names(value), targets),
        modules_to_save=get("modules_to_save", [], _is_names, "a list of names"),
        use_rslora=get("use_rslora", False, lambda flag: isinstance(flag, bool), "true or false"),
        use_dora=get("use_dora", False, lambda flag: isinstance(flag, bool), "true or false"),
        rank_pattern=get("rank_pattern", {}, lambda p: _is_map(p, _is_rank), "a map of patterns to ranks"),
        alpha_pattern=get("alpha_pattern", {}, lambda p: _is_map(p, _is_number), "a map of patterns to numbers"),
        task_type=get("task_type", None, lambda task: task is None or task in list(TASK_HEADS), "a task of PEFT's"),
    )
    if not config.target_modules:
        raise AdapterError(f"{path}: target_modules names no module")
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | WITHOUT_EFFECT | set(UNSUPPORTED)
    strange = sorted(name for name, value in settings.items() if value and name not in known)
    if strange:
        warn_once(("adapter config", tuple(strange)), f"{path}: not known and ignored: {shown(', '.join(strange))}")
    return config


def to_json(config: AdapterConfig, fan_in_fan_out: bool, base_model: str | None) -> dict:
    """The contents of adapter_config.json: what PEFT's `LoraConfig` reads."""
    settings = dataclasses.asdict(config)
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = settings[name]
        settings[name] = value if isinstance(value, str) else list(value) or None
    return settings | {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "peft_type": "LORA",
    }


def read_tensors(
    directory: str | os.PathLike, wanted: Mapping[str, tuple[int, ...]], copies: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a directory's adapter_model.safetensors, on the CPU, by name.

    None is read before all were compared with what is wanted, so that memory is bounded by the model's own adapter.

    Args:
        directory: the adapter's.
        wanted: the shapes of the tensors that must be there; none other may be, but `copies`.
        copies: tensors of the base model, which PEFT adds for an adapted output head. If there, they must be these.

    Raises AdapterError when the file is missing or damaged, or a tensor is not as wanted or not finite.
    """
    path, copies = Path(directory) / WEIGHTS_NAME, copies or {}
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
            missing = [name for name in wanted if name not in shapes]
            extra = [name for name in shapes if name not in wanted and name not in copies]
            for names, what in ((missing, "is missing"), (extra, "has no place in this model")):
                if names:
                    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                    raise AdapterError(f"{path}: {shown(names[0])} {what}{more}")
            for name, shape in shapes.items():
                needed = wanted[name] if name in wanted else tuple(copies[name].shape)
                if shape != needed:
                    raise AdapterError(f"{path}: {name} has shape {shape}, the model needs {needed}")
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: not an adapter, or one whose saving was interrupted") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {shown(str(error))}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"{path}: {name} has the unsupported dtype {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{path}: {name} holds numbers that are not finite")
        if name in copies and not torch.equal(tensor.to(copies[name]), copies[name]):
            raise AdapterError(f"{path}: {name} is another base weight than the model's: it was trained or resized")
    return {name: tensors[name] for name in wanted}


def as_held(path: Path, name: str, tensor: Tensor, held: Tensor) -> Tensor:
    """`tensor` in the dtype of the model's own tensor: rounded, with a warning, where that is a narrower float."""
    if tensor.dtype == held.dtype:
        return tensor
    if not (tensor.is_floating_point() and held.is_floating_point()):
        raise AdapterError(f"{path}: {name} is {tensor.dtype}, the model needs {held.dtype}")
    rounded = tensor.to(held.dtype)
    if not bool(rounded.isfinite().all()):
        raise AdapterError(f"{path}: {name} is {tensor.dtype} and too large for the model's {held.dtype}")
    if not fits(tensor.dtype, held.dtype):
        warn_once(("rounded", tensor.dtype, held.dtype), f"{name} and others are rounded to the model's {held.dtype}")
    return rounded


def fits(dtype: torch.dtype, place: torch.dtype) -> bool:
    """Whether every number of `dtype` is one of `place`."""
    return torch.promote_types(dtype, place) == place


def write_adapter(directory: str | os.PathLike, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all; the configuration comes last and marks the adapter as complete.

    Both are written in full under other names first. Only then is an older adapter there replaced, its configuration
    removed first: an interruption at any moment leaves the old adapter, the new one, or one that is refused as
    incomplete, never a mixture of the two.

    Raises:
        ValueError: a tensor cannot be written: not finite, sharded, or without data (on the meta device).
        AdapterError: `directory` is a file, or holds an adapter_config.json that is not a LoRA adapter's.
        WorkError: writing failed (a full disk, say); an older adapter there is untouched.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory")
    if os.path.lexists(directory / CONFIG_NAME) and _read_json(directory / CONFIG_NAME).get("peft_type") != "LORA":
        raise AdapterError(f"{directory / CONFIG_NAME} is there already and not a LoRA adapter's: nothing written")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise ValueError(f"{name} cannot be saved: {tensor.dtype} is not supported")
        if tensor.is_meta or type(tensor.data) is not Tensor:
            raise ValueError(f"{name} cannot be saved: it is on the meta device, sharded or quantised")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite: training has diverged, and the adapter is not saved")
    # Copies, because the library refuses tensors that share memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # the weights, opened last, take their place first
        with atomic_write(directory / CONFIG_NAME) as new_config, atomic_write(directory / WEIGHTS_NAME) as new_weights:
            new_weights.write_bytes(save(tensors, {"format": "pt"}))
            new_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            (directory / CONFIG_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise WorkError(f"the adapter could not be written to {directory}: {error.strerror or error}") from error


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(read_regular(path, MAX_CONFIG))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: not an adapter, or one whose saving was interrupted") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: no valid JSON ({shown(str(error))})") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path} is damaged: its JSON is no object")
    return found


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # and not NaN


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_map(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))
