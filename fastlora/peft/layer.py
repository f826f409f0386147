"""The subclasses that `patch` sets in place: PEFT's layers with a fused forward.

A call costs little Python: the first one examines the layer (`reasons`) and keeps what it found in a `_Parts`; later
ones check by identity that nothing it read was changed, which takes about two microseconds.
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from fastlora.bank import Route
from fastlora.base_layer import Packed, compute_dtype, form_of, packed_of, statistics_of, weight_of
from fastlora.choice import Choice, explain, explain_call
from fastlora.dora import Norms
from fastlora.dora import fused as dora_fused
from fastlora.errors import warn_once
from fastlora.functional import bank_linear, fused
from fastlora.peft import reasons

_any_autocast = torch._C._is_any_autocast_enabled


class Record:
    """What one patched layer remembers: its counts of calls, and the parts that its last fused call used."""

    __slots__ = ("fallback_calls", "fused_calls", "last", "name", "norms", "parts", "path", "reasons", "route")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.fused_calls = 0
        self.fallback_calls = 0
        self.reasons: dict[str, int] = {}
        self.last: str | None = None  # why the call that was examined last was not fused
        self.parts: _Parts | None = None
        self.path: str | None = None  # of the fused call that was examined last
        self.norms = Norms()  # of the base weight's rows, for DoRA
        self.route: Route | None = None  # inside fastlora.peft.route, where there are no `parts`


class _Parts:
    """A layer that was found fit for fusing: what `reasons.of_layer` read of it, to be compared by identity."""

    __slots__ = (
        "active", "base", "base_type", "dora", "down", "drop", "drop_type", "hooks", "known", "name", "namespaces",
        "special", "up", "variant", "weight_type",
    )  # fmt: skip

    def __init__(self, layer: Fused) -> None:
        active = layer._active_adapter
        self.active = active if isinstance(active, str) else list(active)
        self.name = name = reasons.active_name(layer)
        self.base, self.drop = layer.base_layer, layer.lora_dropout[name]
        self.down, self.up = layer.lora_A[name], layer.lora_B[name]
        self.base_type, self.drop_type = type(self.base), type(self.drop)
        self.variant, self.weight_type = layer.lora_variant.get(name), type(self.base.weight)
        self.special = self.variant is not None or form_of(self.base) is not None
        self.known: tuple | None = None  # the weight as products take it, x's dtype and the bytes, of the last call
        self.dora = None if self.variant is None else layer.lora_magnitude_vector[name]
        used = (self.base, self.down, self.up, self.drop, *(() if self.dora is None else (self.dora,)))
        self.hooks = tuple(hooks for module in used for hooks in reasons.hooks_of(module)) + reasons.GLOBAL_HOOKS
        self.namespaces = tuple(module.__dict__ for module in used[:4])

    def weight(self, layer: Fused, x: Tensor, stored: Tensor) -> Tensor | Packed | None:
        """The weight of a special layer as products take it; None where the last call that was found fit differs from
        this one in more than numbers and x's shape."""
        if self.known is None or _any_autocast() or not (x.is_cpu or torch.is_grad_enabled()):
            return None
        weight, dtype, size = self.known
        if x.dtype is not dtype or stored.nbytes != size:
            return None
        if self.dora is not None:
            same = layer.lora_magnitude_vector._modules.get(self.name) is self.dora
            if not same or type(self.dora._parameters.get("weight")) is not Parameter:
                return None
        if weight.__class__ is not Packed:
            return weight if weight is stored else None
        same = weight.weight is stored and statistics_of(self.base) is weight.statistics
        return weight if same and not weight.changed else None

    def know(self, x: Tensor) -> None:
        """A special layer's call of x was found fit."""
        base = self.base
        packed = form_of(base) is not None and packed_of(base, compute_dtype(base, x))
        self.known = None if _any_autocast() else (packed or base.weight, x.dtype, base.weight.nbytes)

    def hold(self, layer: Fused) -> bool:
        """Whether `layer` is still as it was, its tensors and scaling left aside."""
        modules, name = layer._modules, self.name
        base, down, up, drop = self.namespaces
        return (
            layer._active_adapter == self.active
            and modules["base_layer"] is self.base
            and modules["lora_A"]._modules.get(name) is self.down
            and modules["lora_B"]._modules.get(name) is self.up
            and modules["lora_dropout"]._modules.get(name) is self.drop
            and self.base.__class__ is self.base_type
            and self.down.__class__ is nn.Linear
            and self.up.__class__ is nn.Linear
            and self.drop.__class__ is self.drop_type
            and not any(self.hooks)
            and "forward" not in base
            and "forward" not in down
            and "forward" not in up
            and "forward" not in drop
            and layer.lora_variant.get(name) is self.variant
            and not layer._disable_adapters
            and not layer.merged_adapters
        )


class Fused:
    """A layer of PEFT's with `fastlora.lora_linear` as its arithmetic. Made by `patch`, never constructed.

    Its methods call each other by the class: `unpatch` in another thread may take it from under a call.

    x (..., K) -> (..., N) in the base layer's output dtype. Calls are counted in eager mode only: a counter inside
    compiled code would have the compiler guard on its value.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if is_compiling():
            record = self.__dict__.get("_fastlora")
            if record is not None and record.route is not None:
                return Fused._routed(self, x, args, kwargs, record)
            if (reasons.of_layer(self) or reasons.of_call(self, x, args, kwargs)) is not None:
                return Fused._stock(self).forward(self, x, *args, **kwargs)
            return Fused._compute(self, x, None)

        record = self.__dict__.get("_fastlora")
        parts = record.parts if record is not None else None
        if parts is None or args or kwargs or not parts.hold(self):
            return Fused._examine(self, x, args, kwargs)
        base, adapter = parts.base._parameters, parts.down._parameters
        weight, bias, lora_A = base.get("weight"), base["bias"], adapter.get("weight")
        adapter = parts.up._parameters
        lora_B = adapter.get("weight")
        scaling, x_dtype, drop = self.scaling[parts.name], x.dtype, parts.drop
        if (
            type(weight) is not parts.weight_type
            or type(lora_A) is not Parameter
            or type(lora_B) is not Parameter
            or weight.requires_grad
            or adapter["bias"] is not None
            or (type(scaling) is not float and reasons.of_scaling(scaling) is not None)
            or hasattr(weight, "ds_id")
            or hasattr(lora_A, "ds_id")
            or (not _any_autocast() and x_dtype is not weight.dtype and not parts.special)
            or (x_dtype is not lora_A.dtype and not self.cast_input_dtype_enabled)
            or lora_A.dtype is not lora_B.dtype
        ):
            return Fused._examine(self, x, args, kwargs)
        own = x
        if parts.special:
            weight = parts.weight(self, x, weight)
            if weight is None:
                return Fused._examine(self, x, args, kwargs, parts)
            own, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        else:
            group = self.__dict__.get("_siblings")
            y = None if group is None else group.y(self, x)
            if y is not None:
                record.fused_calls += 1
                return y
        if parts.base_type is Conv1D:
            weight = weight.t()
        p = drop.p if parts.drop_type is nn.Dropout and drop.training else 0.0
        if parts.dora is None:
            y = fused(own, weight, lora_A, lora_B, bias, scaling, p)
        else:
            p, magnitude = p if self.training else 0.0, parts.dora._parameters["weight"]
            y = dora_fused(own, weight, lora_A, lora_B, bias, scaling, p, magnitude, record.norms)
        if y.__class__ is str:  # a function transform, tracing: see fastlora/gate.py
            return Fused._by_peft(self, record, y, x)
        record.fused_calls += 1
        return y if own is x else y.to(x_dtype)

    def _projection(self, x: Tensor) -> tuple | None:
        """What `fastlora.siblings` computes together with others; None for a call that is not known to be plain."""
        record = self.__dict__.get("_fastlora")
        parts = record.parts if record is not None else None
        if parts is None or parts.special or "forward" in self.__dict__ or not parts.hold(self):
            return None
        if reasons.of_call(self, x, (), {}) is not None or parts.base.weight.requires_grad:
            return None
        scaling = self.scaling[parts.name]
        if type(scaling) is not float or hasattr(parts.base.weight, "ds_id"):
            return None
        _, weight, lora_A, lora_B, bias, _, dropout_p = Fused._arguments(self, x)
        return (weight, lora_A, lora_B, bias, scaling), float(dropout_p)

    def _examine(self, x, args, kwargs, parts: _Parts | None = None) -> Tensor:
        """The slow road: find out whether this call can be fused, and remember what the next ones may rely on.

        `parts` that hold spare the layer's part of it."""
        record = self.__dict__.get("_fastlora")
        if record is None:
            record = self.__dict__["_fastlora"] = Record()
        if record.route is not None:
            return Fused._routed(self, x, args, kwargs, record)
        record.parts = parts
        reason = None if parts is not None else reasons.of_layer(self)
        if reason is None:
            record.parts = parts or _Parts(self)
            reason = reasons.of_call(self, x, args, kwargs)
        if reason is None:
            y = Fused._compute(self, x, record)
            if y.__class__ is not str:
                record.fused_calls += 1
                if record.parts.special:
                    record.parts.know(x)
                if record.path is None or record.last is not None or not record.parts.special:
                    record.last, record.path = None, Fused.explain(self, x).path
                return y
            reason = y
        return Fused._by_peft(self, record, reason, x, *args, **kwargs)

    def _routed(self, x, args, kwargs, record: Record) -> Tensor:
        """The call inside `route`: several adapters, each with its own rows."""
        route = record.route
        if isinstance(x, Tensor):
            route.check(x)
        names = route.here(self.lora_A)
        reason = reasons.of_routed(self, x, args, kwargs, names)
        if reason is not None:
            return Fused._by_peft(self, record, reason, x, *args, **kwargs, adapter_names=route.for_peft)
        own, weight, bias = weight_of(self.base_layer, x)
        if not names:
            return self.base_layer(x)
        drops = [drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
                 for drop in (self.lora_dropout[name] for name in names)]  # fmt: skip
        kinds = [(self.r[name], float(self.scaling[name]), p) for name, p in zip(names, drops, strict=True)]
        A = torch.cat([self.lora_A[name].weight for name in names])
        B = torch.cat([self.lora_B[name].weight for name in names], 1)
        bank = route.bank(names, kinds, own)
        y = bank_linear(own, weight, A, B, bias, bank)
        if not is_compiling():
            record.fused_calls += 1
            if record.last is not None or record.path is None:
                choice = explain_call(own, weight, bank.R, own.dtype, A.dtype, bank.drops, max(bank.ranks))
                record.last, record.path = None, choice.path
        return y if own is x else y.to(x.dtype)

    def _by_peft(self, record, reason, x, *args, **kwargs) -> Tensor:
        """PEFT's own forward, counted and explained."""
        record.last = reason
        record.fallback_calls += 1
        record.reasons[reason] = record.reasons.get(reason, 0) + 1
        warn_once(
            ("fastlora.peft", reason),
            f"fastlora.peft: PEFT's own forward runs in {record.name or 'a layer'}: {reason}; "
            "fastlora.peft.report(model) lists every layer",
        )
        return Fused._stock(self).forward(self, x, *args, **kwargs)

    def explain(self, x: Tensor) -> Choice:
        """Which path `self(x)` runs and why; path "peft" is PEFT's own forward. `fastlora.explain` asks this."""
        reason = reasons.of_layer(self) or reasons.of_call(self, x, (), {})
        if reason is not None:
            return Choice("peft", reason)
        x, weight, lora_A, lora_B, *_, dropout_p = Fused._arguments(self, x)
        dropout_p = 0.0 if reasons.active_name(self) in self.lora_variant else dropout_p
        view = SimpleNamespace(weight=weight, lora_A=lora_A, lora_B=lora_B, training=True, lora_dropout=dropout_p)
        return explain(view, x)

    def _compute(self, x: Tensor, record: Record | None) -> Tensor | str:
        """y of a call to which nothing is to be objected, of any kind."""
        arguments, dora = Fused._arguments(self, x), self.lora_magnitude_vector
        if reasons.active_name(self) in self.lora_variant:
            y = dora_fused(*arguments, dora[reasons.active_name(self)].weight, record and record.norms)
        else:
            y = fused(*arguments)
        return y if y.__class__ is str or arguments[0] is x else y.to(x.dtype)

    def _arguments(self, x: Tensor) -> tuple:
        """`lora_linear`'s arguments: x, weight (N, K), lora_A, lora_B, bias, scaling, dropout_p."""
        name, drop = reasons.active_name(self), self.lora_dropout[reasons.active_name(self)]
        x, weight, bias = weight_of(self.base_layer, x)
        drops = isinstance(drop, nn.Dropout) and drop.training and (self.training or name not in self.lora_variant)
        adapter = self.lora_A[name].weight, self.lora_B[name].weight
        return x, weight, *adapter, bias, self.scaling[name], drop.p if drops else 0.0

    def _stock(self) -> type:
        return getattr(type(self), "_own", type(self))

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_fastlora", None)  # a copy, and a pickle, counts its own calls
        return state


# PEFT's layers that are fused, each exactly; those of packages that may be missing are met when PEFT has made one.
FUSABLE = {
    "Linear": "peft.tuners.lora.layer",
    "Linear4bit": "peft.tuners.lora.bnb",
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao",
}


@functools.cache
def fused_class(own: type) -> type | None:
    """The fused subclass of a class of PEFT's, or None where it is not one of `FUSABLE`."""
    if FUSABLE.get(own.__name__) != own.__module__:
        return None
    names = {"__module__": __name__, "__qualname__": "Fused" + own.__name__, "__doc__": Fused.__doc__, "_own": own}
    # repr shows PEFT's own name, and wrapping policies compare with it
    return globals().setdefault(names["__qualname__"], type(own.__name__, (Fused, own), names))


def __getattr__(name: str) -> type:
    """The fused classes that no one has asked for yet: a pickle does."""
    own = name.removeprefix("Fused")
    if own not in FUSABLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused_class(getattr(importlib.import_module(FUSABLE[own]), own))


FusedLinear = fused_class(PeftLinear)
