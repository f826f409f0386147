"""`inject`: put LoRA layers into a model in place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fastlora import siblings
from fastlora.bank import FusedLoRABank, RoutedCopies
from fastlora.errors import warn_once
from fastlora.linear import FusedLoRALinear
from fastlora.targets import TASK_HEADS, AdapterConfig, Plan, names, names_or_pattern, plan

CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def inject(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Iterable[str] | str = "all-linear",
    modules_to_save: Iterable[str] = (),
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: Iterable[str] | str = (),
    task_type: str | None = None,
    adapter_dtype: torch.dtype | None = None,
    layer_class: type[FusedLoRALinear] = FusedLoRALinear,
    use_dora: bool = False,
    adapters: Mapping[str, Mapping] | None = None,
) -> nn.Module:
    """Replace layers of `model` by LoRA layers in place, freeze everything else, and return the model.

    Layers are named as PEFT names them. Hooks on a replaced layer keep working. A layer that the model holds under
    several names is replaced under all of them and adapted once. The base weights stay where they are, shared with
    whatever they were shared with. Query, key and value of a transformers model, and gate and up, are computed together
    where `fastlora.siblings.on` is set. Nothing is changed when an error is raised.

    Args:
        model: any module that holds layers which `FusedLoRALinear.from_linear` takes.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, use_dora: as for `FusedLoRALinear`.
        target_modules: a list of names, each a whole name or its end after a dot ("q_proj" means every "...q_proj"); or
            a regular expression that must match the whole name; or "all-linear": every nn.Linear and Conv1D but the
            output head of a transformers model.
        modules_to_save: name ends of modules that are trained in full and saved with the adapter. They get no LoRA
            layer. One that shares parameters with another module (a tied output head) is copied first, and so untied,
            as PEFT does.
        rank_pattern, alpha_pattern: other ranks and alphas for layers whose name, or its end after a dot, matches a
            regular expression; the first match counts.
        exclude_modules: layers left out, named as in target_modules.
        task_type: PEFT's ("SEQ_CLS", "CAUSAL_LM", ...): written to the adapter's config; "SEQ_CLS" and "TOKEN_CLS" add
            "classifier" and "score" to modules_to_save, "QUESTION_ANS" adds "qa_outputs", as PEFT does.
        layer_class: `FusedLoRALinear` or a subclass of it.
        adapters: several adapters by name, each with its own `r`, `lora_alpha`, `lora_dropout`, `use_rslora`,
            `rank_pattern` or `alpha_pattern`; what one leaves out is the argument's. They learn side by side, each from
            the samples that `fastlora.route` gives it, and each trains a copy of what modules_to_save names. Their
            parameters are ordinary ones: `layer.adapters[name].parameters()`.

    Raises:
        TypeError, ValueError: nothing matches, a named layer is of an unsupported kind, the model already has LoRA
            layers, or an argument is out of its range; the message names it.
    """
    if task_type is not None and task_type not in TASK_HEADS:
        raise ValueError(f"task_type must be None or one of {', '.join(TASK_HEADS)}, got {task_type!r}")
    saved = names("modules_to_save", modules_to_save)
    saved += tuple(head for head in TASK_HEADS.get(task_type, ()) if head not in saved)
    config = AdapterConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=names_or_pattern("target_modules", target_modules),
        exclude_modules=names_or_pattern("exclude_modules", exclude_modules),
        modules_to_save=saved,
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        task_type=task_type,
        use_dora=bool(use_dora),
    )
    if adapters is None:
        return attach(model, {None: plan(model, config)}, adapter_dtype, layer_class)
    if use_dora:
        raise ValueError("use_dora: DoRA scales all rows alike, so several adapters cannot share them")
    if layer_class is not FusedLoRALinear:
        raise ValueError(f"layer_class must be FusedLoRALinear with several adapters, got {layer_class!r}")
    plans = {name: plan(model, _of_one(name, config, own)) for name, own in _checked(adapters).items()}
    return attach(model, plans, adapter_dtype, layer_class)


OWN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")


def _checked(adapters: Mapping[str, Mapping]) -> Mapping[str, Mapping]:
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapters must be a map of names to settings, got {adapters!r}")
    taken = dir(nn.ModuleDict)
    for name in adapters:
        if not isinstance(name, str) or not name or "." in name or name in taken:
            raise ValueError(f"adapters holds the name {name!r}; it needs letters, and no dot")
    return adapters


def _of_one(name: str, config: AdapterConfig, own: Mapping) -> AdapterConfig:
    strange = sorted(set(own) - set(OWN)) if isinstance(own, Mapping) else [own]
    if strange:
        raise ValueError(f"adapters[{name!r}] has {strange[0]!r}; an adapter may have {', '.join(OWN)}")
    return dataclasses.replace(config, **own)


def attach(
    model: nn.Module,
    plans: Mapping[str | None, Plan],
    adapter_dtype: torch.dtype | None = None,
    layer_class: type[FusedLoRALinear] = FusedLoRALinear,
) -> nn.Module:
    """Carry out the plan of each adapter, all of the same layers; one without a name is the only one. All that can
    fail comes before the first change to the model."""
    if not (isinstance(layer_class, type) and issubclass(layer_class, FusedLoRALinear)):
        raise TypeError(f"layer_class must be FusedLoRALinear or a subclass of it, got {layer_class!r}")
    plan, alone = next(iter(plans.values())), None in plans
    asked = [(p, p.requires_grad) for p in model.parameters()]
    new: dict[nn.Module, nn.Module] = {}
    try:
        for name, module in plan.targets.items():
            made = {
                adapter: layer_class.from_linear(
                    module,
                    r=own.ranks[name],
                    lora_alpha=own.alphas[name],
                    lora_dropout=own.config.lora_dropout,
                    use_rslora=own.config.use_rslora,
                    adapter_dtype=adapter_dtype,
                    use_dora=own.config.use_dora,
                )
                for adapter, own in plans.items()
            }
            layer = made[None] if alone else FusedLoRABank(made).train(module.training)
            for hooks in CALL_HOOKS:
                if hooks in module.__dict__:
                    layer.__dict__[hooks] = module.__dict__[hooks]  # the same dict: handles can still remove from it
            layer._is_full_backward_hook = module._is_full_backward_hook
            new[module] = layer
        if alone:
            new |= {module: copy.deepcopy(module) for module in tied_modules(model, plan.saved.values())}
        else:
            for module in plan.saved.values():
                copies = {adapter: copy.deepcopy(module) for adapter in plans}
                new[module] = RoutedCopies(module, copies).train(module.training)
    except BaseException:
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)
        raise

    for parameter, _ in asked:
        parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
    for module in map(model.get_submodule, plan.saved):
        for parameter in (module if alone else module.copies).parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    for layer in new.values():
        for part in layer.modules():
            if isinstance(part, FusedLoRALinear):
                part.requires_grad_(True)
    _leave_fast_paths(model)
    siblings.join(model, lambda layer: isinstance(layer, FusedLoRALinear))
    model.fastlora_config = plan.config if alone else {adapter: own.config for adapter, own in plans.items()}
    return model


def tied_modules(model: nn.Module, saved: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of `saved` that share a parameter with a module outside themselves."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    tied = []
    for module in saved:
        own = set(module.modules())
        if any(owner not in own for p in module.parameters() for owner in owners[id(p)]):
            tied.append(module)
            warn_once(
                ("tied", type(module)),
                f"a {type(module).__name__} of modules_to_save shares parameters with another module: it trains a copy",
            )
    return tied


def _leave_fast_paths(model: nn.Module) -> None:
    # torch's own encoder layers read linear1.weight past the module when they do not train: these switches stop it.
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            isinstance(part, FusedLoRALinear) for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
