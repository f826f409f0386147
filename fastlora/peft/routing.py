"""`route`: a patched PEFT model with several adapters, each sample of a batch with its own, while it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fastlora.bank import Route, checked
from fastlora.errors import warn_once
from fastlora.peft.layer import Fused, Record


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, each sample of a batch (dimension 0) runs with the adapter named for it, in training too, where PEFT
    refuses `adapter_names`; None is the base alone. Which adapters are active makes no difference.

    Modules of modules_to_save and LoRA layers that are not fused take PEFT's own way for `adapter_names`. PEFT lets
    only the active adapter learn; `p.requires_grad_()` for the parameters p that have ".b." in their names makes "b"
    learn too, and what modules_to_save copied for it.

    Args:
        model: a model after `fastlora.peft.patch`.
        names: the name of each sample's adapter, or None.

    Raises:
        TypeError, ValueError: names is no list of names that the model's adapters have; the one is named.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    fused = [layer for layer in layers if isinstance(layer, Fused)]
    others = [layer for layer in layers if not isinstance(layer, Fused)]
    others += [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    records = [layer.__dict__.setdefault("_fastlora", Record()) for layer in fused]
    before = [record.route for record in records]
    new = checked(names, {name for layer in layers for name in layer.lora_A}, before)
    _warn_of_idle(new, fused)
    handles = [module.register_forward_pre_hook(_hook(new), with_kwargs=True) for module in others]
    for record in records:
        record.route, record.parts = new, None
    try:
        yield
    finally:
        for record, old in zip(records, before, strict=True):
            record.route = old
        for handle in handles:
            handle.remove()


def _hook(route: Route):
    return lambda module, args, kwargs: (args, kwargs | {"adapter_names": route.for_peft})


def _warn_of_idle(route: Route, layers: Sequence[nn.Module]) -> None:
    idle = [n for n in route.used if not any(x.lora_A[n].weight.requires_grad for x in layers if n in x.lora_A)]
    if idle and len(idle) < len(route.used) and torch.is_grad_enabled():
        message = (f"fastlora.peft.route: adapter {idle[0]!r} asks for no gradient, others do; "
                   f"requires_grad_() for the parameters with '.{idle[0]}.' in their names makes it learn")  # fmt: skip
        warn_once(("fastlora.peft.route", idle[0]), message)
