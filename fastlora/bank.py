"""Several adapters over one frozen model, trained together: `inject(adapters=...)` makes them, `route` tells which rows
are whose.

    model = fastlora.inject(model, adapters={"a": {"r": 4}, "b": {"r": 16, "lora_dropout": 0.1}}, target_modules=[...])
    with fastlora.route(model, ["a", "b", "b", None]):     # the adapter of each sample of the batch; None: the base
        loss(model(x)).backward()

Each adapter's outputs and gradients are those that it would have alone with its own rows. All share one read of x and
one product with the weight: a bank of adapters is one adapter whose S is block-diagonal (paths/bank.py). On a GPU a
number that is not finite in one adapter's rows can reach the others' gradients through products with zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.base_layer import Packed, dense, weight_of
from fastlora.choice import Choice, explain_call
from fastlora.functional import bank_linear
from fastlora.linear import FusedLoRALinear
from fastlora.paths.bank import Bank


class Route:
    """The adapter of each sample of a batch, by name, or None; and the banks that layers were given for it."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.used = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self._banks: dict[tuple, Bank] = {}

    @property
    def for_peft(self) -> list[str]:
        """The names as PEFT writes them."""
        return ["__base__" if name is None else name for name in self.names]

    def here(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Those of the batch's adapters that a layer has."""
        return tuple(name for name in self.used if name in adapters)

    def bank(self, adapters: tuple[str, ...], layers: Sequence[tuple[int, float, float]], x: Tensor) -> Bank:
        """The bank of `adapters`, of which (rank, scaling, dropout probability) are `layers`, for x (samples, ..., K).

        Raises:
            ValueError: x has another number of samples.
        """
        if x.dim() < 2 or x.shape[0] != len(self.names):
            raise ValueError(f"x has shape {tuple(x.shape)}; its first dimension needs to be the {len(self.names)} "
                             "samples that route was told of")  # fmt: skip
        each = x.shape[1:-1].numel()
        key = adapters, tuple(layers), each, x.device
        if key not in self._banks:
            place = {name: i for i, name in enumerate(adapters)}
            owners = [place.get(name) for name in self.names]
            self._banks[key] = Bank.of(*zip(*layers, strict=True), owners, each, x.device)
        return self._banks[key]


class FusedLoRABank(nn.Module):
    """A frozen linear layer with several adapters, each a `FusedLoRALinear` over the same weight.

    `adapters` holds them by name. A call needs `route`: without one it raises RuntimeError.
    """

    def __init__(self, adapters: Mapping[str, FusedLoRALinear]) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(adapters)
        self.__dict__["_route"] = None

    def forward(self, x: Tensor) -> Tensor:
        """x (samples, ..., K) -> (samples, ..., N)."""
        route = _routed(self)
        names = route.here(self.adapters)
        if len(names) == 1 and None not in route.names and set(route.names) == set(names):
            return self.adapters[names[0]](x)
        given, (x, weight, bias) = x, self._base(x)
        if not names:
            return F.linear(x, dense(weight), bias).to(given.dtype)
        A = torch.cat([self.adapters[name].lora_A for name in names])
        B = torch.cat([self.adapters[name].lora_B for name in names], 1)
        return bank_linear(x, weight, A, B, bias, self._bank(names, x)).to(given.dtype)

    def explain(self, x: Tensor) -> Choice:
        """Which path `self(x)` runs, and why."""
        names = _routed(self).here(self.adapters) or tuple(self.adapters)[:1]
        (x, weight, _), bank = self._base(x), self._bank(names, x)
        first = self.adapters[names[0]]
        return explain_call(x, weight, bank.R, x.dtype, first.lora_A.dtype, bank.drops, True)

    def _base(self, x: Tensor) -> tuple[Tensor, Tensor | Packed, Tensor | None]:
        one = next(iter(self.adapters.values()))
        return (x, one._base_weight(), one.bias) if one._quantised is None else weight_of(one._quantised, x)

    def _bank(self, names: tuple[str, ...], x: Tensor) -> Bank:
        layers = [self.adapters[name] for name in names]
        kinds = [(one.r, one.scaling, one.lora_dropout if one.training else 0.0) for one in layers]
        return _routed(self).bank(names, kinds, x)


class RoutedCopies(nn.Module):
    """A module of which each adapter trains a copy in full: `copies` by name; `base` serves the other samples."""

    def __init__(self, base: nn.Module, copies: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.base, self.copies = base, nn.ModuleDict(copies)
        self.__dict__["_route"] = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (samples, ...): each adapter's samples go through its copy."""
        route = _routed(self)
        if len(route.names) != x.shape[0]:
            raise ValueError(f"x has {x.shape[0]} samples; route was told of {len(route.names)}")
        kinds = dict.fromkeys(name if name in self.copies else None for name in route.names)
        modules = {name: self.base if name is None else self.copies[name] for name in kinds}
        if len(kinds) == 1:
            return next(iter(modules.values()))(x, *args, **kwargs)
        where = {name: [i for i, other in enumerate(route.names) if other == name] for name in kinds if name}
        where[None] = sorted(set(range(len(route.names))) - {i for own in where.values() for i in own})
        parts = [modules[name](x[where[name]], *args, **kwargs) for name in kinds]
        order = [i for name in kinds for i in where[name]]
        return torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, each sample of a batch (dimension 0 of what the layers see) runs with the adapter named for it.

    Backward needs no route, but under gradient checkpointing, which runs forward again.

    Args:
        model: made by `inject(adapters=...)`.
        names: the name of each sample's adapter, None for the base alone.

    Raises:
        ValueError: the model has no adapter of such a name; it is named.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FusedLoRABank | RoutedCopies)]
    known = {name for layer in layers if isinstance(layer, FusedLoRABank) for name in layer.adapters}
    new, before = checked(names, known), [layer.__dict__["_route"] for layer in layers]
    for layer in layers:
        layer.__dict__["_route"] = new
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.__dict__["_route"] = old


def checked(names: Sequence[str | None], known: Iterable[str]) -> Route:
    """A route by these names, each of which is known."""
    if not known:
        raise ValueError("model has no adapters to choose from: fastlora.inject(model, adapters={...}) makes them")
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list with the adapter of each sample, or None, got {names!r}")
    unknown = sorted({name for name in names if name is not None} - set(known))
    if unknown:
        raise ValueError(f"names holds {unknown[0]!r}; the model has the adapters {', '.join(sorted(known))}")
    return Route(names)


def _routed(layer: nn.Module) -> Route:
    route = layer.__dict__["_route"]
    if route is None:
        raise RuntimeError("this model has several adapters: call it inside `with fastlora.route(model, names):`")
    return route
