"""`patch`, `unpatch` and `report`: which layers of a model are fused, and why the others are not.

To add a release of PEFT: run tests/peft with it; read what changed in `peft.tuners.lora.layer`'s `Linear.forward` and
`update_layer` since the last known one, and give what would compute otherwise a reason in `reasons.py`; then raise
KNOWN_VERSIONS below. Other releases are fused too, with a warning.
"""

from __future__ import annotations

import re

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from fastlora import siblings
from fastlora.errors import warn_once
from fastlora.peft import reasons
from fastlora.peft.layer import Fused, Record, fused_class

KNOWN_VERSIONS = ((0, 17), (0, 21))  # the first and last release series that this was run against


class LayerReport(str):
    """The path that a layer's fused calls take, or the reason that PEFT's own forward runs; with its calls so far.

    Attributes:
        fused: whether a call would be fused now.
        fused_calls, fallback_calls: eager calls so far; those inside compiled code are not counted.
        reasons: {reason: fallback calls} of the calls so far.
        together: the names of the layers that were last computed with this one, itself among them; () if it was alone.
    """

    fused: bool
    fused_calls: int
    fallback_calls: int
    reasons: dict[str, int]
    together: tuple[str, ...] = ()

    def __new__(cls, text: str, fused: bool, record: Record | None = None):
        self = super().__new__(cls, text)
        record = record or Record()
        self.fused, self.reasons = fused, dict(record.reasons)
        self.fused_calls, self.fallback_calls = record.fused_calls, record.fallback_calls
        return self


class Report(dict):
    """{module name: LayerReport}; printed as a table."""

    @property
    def fused_calls(self) -> int:
        return sum(entry.fused_calls for entry in self.values())

    @property
    def fallback_calls(self) -> int:
        return sum(entry.fallback_calls for entry in self.values())

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [
            f"{name:<{width}}  {entry}  [{entry.fused_calls} fused calls, {entry.fallback_calls} by PEFT]"
            + f"  together: {', '.join(entry.together)}" * bool(entry.together)
            + "".join(f"\n{'':<{width}}    {calls} x {reason}" for reason, calls in entry.reasons.items())
            for name, entry in self.items()
        ]
        return "\n".join([*lines, f"{self.fused_calls} fused calls, {self.fallback_calls} by PEFT's own forward"])


def patch(module: nn.Module) -> nn.Module:
    """Fuse every `peft.tuners.lora.Linear` in `module`, itself included, in place, and PEFT's layers over linear layers
    of bitsandbytes and torchao.

    Exactly those types (`layer.FUSABLE`): the others, of GPTQ, AWQ or HQQ, are left alone. Each layer stays the same
    object with the same state dict, repr, config and hooks. Call it after `get_peft_model`, `PeftModel.from_pretrained`
    or `load_adapter`, before or after `torch.compile`; calling it again fuses what was added since.

    Args:
        module: any module; usually a `PeftModel`.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is not an nn.Module.
    """
    _check_module(module)
    _check_version(peft.__version__)
    found = False
    for name, layer in module.named_modules():
        kind = fused_class(type(layer))
        if kind is not None:
            layer.__class__ = kind
            layer.__dict__["_fastlora"] = Record(name)
        found = found or isinstance(layer, Fused)
    siblings.join(module, lambda layer: isinstance(layer, Fused))
    if not found:
        warn_once(
            "fastlora.peft found nothing",
            f"fastlora.peft.patch found no peft.tuners.lora.Linear in this {type(module).__name__}; "
            "call it after get_peft_model",
        )
    return module


def unpatch(module: nn.Module) -> nn.Module:
    """Give every patched layer in `module` its own class back, in place; the counts are forgotten.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is not an nn.Module.
    """
    _check_module(module)
    for name, layer in module.named_modules():
        own = getattr(type(layer), "_own", None)
        if own is not None and type(layer) is fused_class(own):
            layer.__class__ = own
            layer.__dict__.pop("_fastlora", None)
            group = layer.__dict__.pop("_siblings", None)
            if group is not None:
                group.leave(layer)
        elif own is not None:  # fully_shard has put its own subclass on top
            warn_once(
                ("fastlora.peft.unpatch", type(layer)),
                f"fastlora.peft.unpatch leaves {name} fused: its class was changed after patch, to {type(layer)}",
            )
    return module


def report(module: nn.Module) -> Report:
    """How every LoRA layer of `module` runs.

    Returns:
        {module name: path, or the reason PEFT's own forward runs}. Each value is a string with the attributes
        `fused`, `fused_calls`, `fallback_calls` and `reasons` (see `LayerReport`). `print` it for a table.

    Raises:
        TypeError: `module` is not an nn.Module.
    """
    _check_module(module)
    found = Report((name, _entry(layer)) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))
    for name, entry in found.items():
        entry.together = siblings.together_with(module.get_submodule(name))
    return found


def _entry(layer: LoraLayer) -> LayerReport:
    if not isinstance(layer, Fused):
        if fused_class(type(layer)) is not None:
            return LayerReport("not patched", False)
        kind, why = type(layer), "not exactly a linear layer of PEFT's over a dense, bitsandbytes or torchao weight"
        if kind.__name__ == "ParamWrapper":
            why = "whose update is added to a parameter that the module below (experts) reads itself"
        return LayerReport(f"left alone: a {kind.__module__}.{kind.__qualname__}, {why}", False)
    record = layer.__dict__.get("_fastlora") or Record()
    if "forward" in layer.__dict__:
        return LayerReport("the layer's own forward is replaced, by accelerate for example", False, record)
    reason = reasons.of_layer(layer)
    if reason is None and record.last is not None and record.last.startswith(reasons.SHARDED):
        reason = record.last
    if reason is None:
        return LayerReport(record.path or "fused: no call in eager mode yet, so no path is known", True, record)
    if reason.startswith(reasons.SHARDED) and record.parts is not None:
        return LayerReport("fused: sharded outside forward, whole inside it", True, record)
    return LayerReport(reason, False, record)


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; it needs to be a torch.nn.Module")


def _check_version(version: str) -> None:
    match = re.match(r"(\d+)\.(\d+)", version)
    first, last = KNOWN_VERSIONS
    if match is None or not first <= (int(match[1]), int(match[2])) <= last:
        warn_once(
            ("fastlora.peft", version),
            f"fastlora.peft knows PEFT {first[0]}.{first[1]} to {last[0]}.{last[1]}, and this is {version}: compare "
            "outputs with and without fastlora.peft.patch before you rely on them",
        )
