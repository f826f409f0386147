"""Which modules of a model a LoRA configuration names: PEFT's rules, and PEFT's vocabulary for the configuration."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from fastlora.base_layer import base_parameters, is_conv1d
from fastlora.errors import warn_once
from fastlora.linear import FusedLoRALinear

# Heads that PEFT trains in full for a task, whether asked or not.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What was asked of `inject`, in PEFT's vocabulary; kept on the model as `fastlora_config` for `save_adapter`."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    task_type: str | None = None
    use_dora: bool = False

    def saves(self, name: str) -> bool:
        """Whether PEFT would train and save the module `name` in full: by the end of its name, dots or not."""
        return any(name.endswith(wanted) for wanted in self.modules_to_save)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The layers to be replaced and the modules to be trained in full, by name; nothing is changed yet.

    `ranks` and `alphas` are those of the layers.
    """

    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    config: AdapterConfig
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


def plan(model: nn.Module, config: AdapterConfig) -> Plan:
    """Which modules `config` names in `model`; the errors of `inject`, and no change to the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise ValueError(
            "model is itself a linear layer, which cannot be replaced in place: use FusedLoRALinear.from_linear(model)"
        )
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, FusedLoRALinear):
            raise ValueError(f"model already has LoRA layers ({name or 'itself'}); inject into a model once only")
        if _is_peft_layer(module):
            raise ValueError(f"model already has PEFT layers ({name}); use fastlora.peft.patch(model) for those")

    saved = saved_modules(model, config)
    if config.modules_to_save and not saved and config.modules_to_save != TASK_HEADS.get(config.task_type):
        raise ValueError(_nothing_matches("modules_to_save", config.modules_to_save, modules))

    wanted = _wanted(model, modules, config)
    targets = {name: modules[name] for name in wanted if not _inside(name, saved)}
    if not targets:
        linears = {name: module for name, module in modules.items() if _is_linear(module)}
        raise ValueError(_nothing_matches("target_modules", config.target_modules, linears))
    for name, module in targets.items():
        try:
            base_parameters(module)
        except TypeError as error:
            raise ValueError(f"target_modules matches {name!r}, which cannot be replaced: {error}") from None
        if _reads_weight_itself(modules, name):
            raise ValueError(
                f"target_modules matches {name!r}, whose nn.MultiheadAttention reads its weight and never calls it: "
                "an adapter there would have no effect"
            )
    if config.target_modules == "all-linear" or len(targets) < len(wanted):
        # The names themselves, as PEFT records "all-linear", so that PEFT finds the same layers again.
        config = dataclasses.replace(config, target_modules=tuple(sorted(targets)))
    ranks = by_pattern("rank_pattern", config.rank_pattern, targets, config.r)
    alphas = by_pattern("alpha_pattern", config.alpha_pattern, targets, config.lora_alpha)
    return Plan(targets, saved, config, ranks, alphas)


def matched(config: AdapterConfig, names: Iterable[str], saved: Iterable[str]) -> set[str]:
    """Those of `names` that `config` makes LoRA layers of, by name alone."""
    is_target, is_excluded = matcher(config.target_modules), matcher(config.exclude_modules)
    return {name for name in names if is_target(name) and not is_excluded(name) and not _inside(name, saved)}


def saved_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules of `model` that `config` trains in full, by name; of nested ones the outermost."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if config.saves(name) and not _inside(name, found):
            found[name] = module
    return found


def names(argument: str, value: Iterable[str]) -> tuple[str, ...]:
    """`value` as a tuple of names, checked; `argument` is what an error calls it."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be a list of names, got {value!r}")
    found = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    if not all(isinstance(name, str) and name for name in found):
        raise TypeError(f"{argument} must hold names only, got {found!r}")
    return found


def names_or_pattern(argument: str, value: Iterable[str] | str) -> tuple[str, ...] | str:
    """A list of names as a tuple, or a regular expression; "all-linear" in any case of letters is lowered."""
    if not isinstance(value, str):
        return names(argument, value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{argument} is not a regular expression ({error}): {value!r}") from None
    return "all-linear" if value.lower() == "all-linear" else value


def matcher(wanted: tuple[str, ...] | str) -> Callable[[str], bool]:
    """Whether a name is among `wanted`: PEFT's rule for target_modules and exclude_modules."""
    if isinstance(wanted, str):
        return lambda name: bool(wanted) and re.fullmatch(wanted, name) is not None
    whole, ends = frozenset(wanted), tuple(f".{end}" for end in wanted)
    return lambda name: name in whole or name.endswith(ends)


def _wanted(model: nn.Module, modules: dict[str, nn.Module], config: AdapterConfig) -> list[str]:
    if config.target_modules == "all-linear":
        heads = _output_heads(model, config.task_type)
        found = [name for name, module in modules.items() if _is_linear(module) and module not in heads]
        skipped = [name for name in found if _reads_weight_itself(modules, name)]
        if skipped:
            warn_once(
                ("all-linear", tuple(skipped)),
                f"all-linear leaves out {', '.join(skipped)}: nn.MultiheadAttention reads that weight itself",
            )
        found = [name for name in found if name not in skipped]
    else:
        is_target = matcher(config.target_modules)
        found = [name for name in modules if name and is_target(name)]
        if found and isinstance(config.target_modules, tuple):
            parts = [name.split(".") for name in modules]
            ends = {".".join(part[i:]) for part in parts for i in range(len(part))}
            idle = [name for name in config.target_modules if name not in ends]
            if idle:
                warn_once(("idle", tuple(idle)), f"target_modules: nothing is named {', '.join(map(repr, idle))}")
    is_excluded = matcher(config.exclude_modules)
    return [name for name in found if not is_excluded(name)]


def _output_heads(model: nn.Module, task_type: str | None) -> list[nn.Module]:
    home = sys.modules.get("transformers")
    if home is None or not isinstance(model, home.PreTrainedModel):
        return []
    head = model.get_output_embeddings()
    if head is None and task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return [] if head is None else [head]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_peft_layer(module: nn.Module) -> bool:
    home = sys.modules.get("peft.tuners.tuners_utils")
    return home is not None and isinstance(module, home.BaseTunerLayer)


def _reads_weight_itself(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def by_pattern(argument: str, patterns: Mapping, names: Iterable[str], default) -> dict:
    """The value of each of `names`: that of the first pattern which matches it or its end after a dot."""
    compiled = []
    for pattern, value in patterns.items():
        try:
            compiled.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            raise ValueError(f"{argument} holds no regular expression ({error}): {pattern!r}") from None
    return {name: next((value for regex, value in compiled if regex.match(name)), default) for name in names}


def _nothing_matches(argument: str, wanted: tuple[str, ...] | str, modules: dict[str, nn.Module]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()})
    asked = [wanted] if isinstance(wanted, str) else wanted
    near = [end for name in asked[:5] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=3)]
    listed = list(dict.fromkeys(near)) or ends[:12]
    what = ", ".join(repr(name[:100]) for name in asked[:5]) + (f" and {len(asked) - 5} more" if len(asked) > 5 else "")
    there = f"names there: {', '.join(listed)}" if listed else "it has no such layer at all"
    hint = " (text is a pattern for whole names; give a list for the ends of names)" if isinstance(wanted, str) else ""
    return f"{argument}: {what or 'an empty list'} matches no module of the model{hint}; {there}"
