"""PEFT's adapter_config.json: what of it is understood, and what is refused with its reason.

Its regular expressions are never run: the layers and their ranks are known from the tensors, and a key of
`alpha_pattern` is taken where it is plain text (see `alphas_of`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from fastlora.adapter_files import AdapterError, shown
from fastlora.errors import warn_once
from fastlora.targets import TASK_HEADS, AdapterConfig

MAX_PATTERNS = 20_000
PLAIN_KEY = re.compile(r"(\^?)((?:[\w.-]|\\\W)+)\$?")

# Settings that change what a LoRA layer computes: an adapter that uses one cannot be loaded as a plain one.
UNSUPPORTED = {
    "use_dora": "DoRA",
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


def from_json(settings: dict, where: object) -> AdapterConfig:
    """The configuration in `settings`; AdapterError, naming `where`, for what is malformed or not supported."""

    def refuse(why: str) -> AdapterError:
        return AdapterError(f"{where}: {why}")

    def get(name: str, default, fits, wanted: str):
        value = settings.get(name)
        value = default if value is None else value
        if not fits(value):
            raise refuse(f"{name} must be {wanted}, got {shown(value)}")
        return value

    if settings.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {shown(settings.get('peft_type'))}; only LORA adapters can be loaded")
    for name, what in UNSUPPORTED.items():
        if settings.get(name):
            raise refuse(f"the adapter uses {what} ({name}), which is not supported")
    if settings.get("bias", "none") != "none":
        raise refuse(f"the adapter trains biases (bias={shown(settings['bias'])}), which is not supported")
    init = settings.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in HARMLESS_INIT):
        raise refuse(f"init_lora_weights is {shown(init)}: it belongs to a changed base weight; not supported")

    config = AdapterConfig(
        r=get("r", 8, _rank, "an integer of at least 1"),
        lora_alpha=get("lora_alpha", 8, _number, "a finite number"),
        lora_dropout=get("lora_dropout", 0.0, lambda p: _number(p) and 0 <= p < 1, "at least 0 and less than 1"),
        target_modules=_tuple(get("target_modules", [], _names_or_text, "a list of names or a regular expression")),
        exclude_modules=_tuple(get("exclude_modules", [], _names_or_text, "a list of names or a regular expression")),
        modules_to_save=_tuple(get("modules_to_save", [], _names, "a list of names")),
        use_rslora=get("use_rslora", False, lambda flag: isinstance(flag, bool), "true or false"),
        rank_pattern=get("rank_pattern", {}, lambda p: _patterns(p, _rank), "a map of patterns to ranks"),
        alpha_pattern=get("alpha_pattern", {}, lambda p: _patterns(p, _number), "a map of patterns to numbers"),
        task_type=get("task_type", None, lambda task: task is None or task in list(TASK_HEADS), "a task of PEFT's"),
    )
    if not config.target_modules:
        raise refuse("target_modules names no module")
    for key in config.alpha_pattern:
        if not PLAIN_KEY.fullmatch(key):
            raise refuse(f"alpha_pattern holds {shown(key)}; regular expressions out of a file are not run")
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | WITHOUT_EFFECT | set(UNSUPPORTED)
    strange = sorted(name for name, value in settings.items() if value and name not in known)
    if strange:
        warn_once(("adapter config", tuple(strange)), f"{where}: not known and ignored: {shown(', '.join(strange))}")
    return config


def to_json(config: AdapterConfig, fan_in_fan_out: bool, base_model: str | None) -> dict:
    """The contents of adapter_config.json: what PEFT's `LoraConfig` reads."""

    def listed(value):
        return value if isinstance(value, str) else list(value) or None

    settings = dataclasses.asdict(config)
    settings["lora_alpha"] = _integral(config.lora_alpha)
    settings["alpha_pattern"] = {key: _integral(alpha) for key, alpha in config.alpha_pattern.items()}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        settings[name] = listed(settings[name])
    return settings | {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "peft_type": "LORA",
        "revision": None,
        "use_dora": False,
    }


def alphas_of(config: AdapterConfig, names: Iterable[str]) -> dict[str, float]:
    """The alpha of each layer by a configuration out of a file: that of the first key which names the layer.

    As PEFT's `(.*\\.)?(key)$` has it, without running it: a key names a layer or the end of its name after a dot, a "."
    in it stands for any character unless it is escaped, and a leading "^" asks for the whole name.
    """
    keys = []
    for key, alpha in config.alpha_pattern.items():
        whole, text = PLAIN_KEY.fullmatch(key).groups()
        letters = [part[-1] if part != "." else None for part in re.findall(r"(?s)\\.|.", text)]
        keys.append((bool(whole), letters, alpha))
    return {
        name: next((alpha for whole, letters, alpha in keys if _ends_in(name, letters, whole)), config.lora_alpha)
        for name in names
    }


def _ends_in(name: str, letters: list[str | None], whole: bool) -> bool:
    start = len(name) - len(letters)
    if start < 0 or (start > 0 and (whole or name[start - 1] != ".")):
        return False
    return all(letter in (None, found) for letter, found in zip(letters, name[start:], strict=True))


def exact_key(name: str) -> str:
    """The key of rank_pattern or alpha_pattern that stands for the layer `name` alone."""
    return f"^{re.escape(name)}"


def _integral(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _names_or_text(value: object) -> bool:
    return isinstance(value, str) or _names(value)


def _patterns(value: object, fits) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_PATTERNS and all(fits(item) for item in value.values())


def _tuple(value: list | str) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value)
