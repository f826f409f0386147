"""PEFT's adapter_config.json: what of it is understood, and what is refused with its reason."""

from __future__ import annotations

import dataclasses
import math
import re
import sys

from fastlora.adapter_files import AdapterError, shown
from fastlora.errors import warn_once
from fastlora.targets import TASK_HEADS, AdapterConfig

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as sre_parse
else:
    import sre_constants as sre
    import sre_parse

MAX_PATTERNS = 2000
MAX_REPEATS = 4

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
    *(
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
    ),
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
    for pattern in patterns(config):
        why = why_refused(pattern)
        if why:
            raise refuse(f"the regular expression {shown(pattern)} {why}")
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


def patterns(config: AdapterConfig) -> list[str]:
    """All regular expressions in a configuration."""
    wanted = [value for value in (config.target_modules, config.exclude_modules) if isinstance(value, str) and value]
    return [*wanted, *config.rank_pattern, *config.alpha_pattern]


def why_refused(pattern: str) -> str | None:
    """Why a stranger's regular expression is not run, or None: one that matches in bounded time is.

    Python's matcher takes exponential time for a repetition within a repetition and time n^k for k of them in
    a row.
    """
    try:
        if _repeats(sre_parse.parse(pattern)) > MAX_REPEATS:
            return f"has more than {MAX_REPEATS} repetitions in a row or nested ones, which can take forever"
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not valid ({shown(str(error))})"
    return None


def _repeats(parsed) -> float:
    """How many repetitions follow each other at most; infinite where one holds another, or a choice."""
    count = 0.0
    for op, args in parsed:
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT) or op is getattr(sre, "POSSESSIVE_REPEAT", None):
            _, most, body = args
            inner = _repeats(body)
            if most == 1:
                count += inner
            else:
                count += math.inf if inner or any(part is sre.BRANCH for part, _ in _flat(body)) else 1
        elif op is sre.BRANCH:
            count += max(_repeats(branch) for branch in args[1])
        else:
            count += sum(_repeats(part) for part in _bodies(args))
    return count


def _flat(parsed):
    for op, args in parsed:
        yield op, args
        for part in _bodies(args):
            yield from _flat(part)


def _bodies(args):
    if isinstance(args, sre_parse.SubPattern):
        return [args]
    return [part for part in args if isinstance(part, sre_parse.SubPattern)] if isinstance(args, tuple) else []


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
