"""Several adapters over one frozen model, trained together: `inject(adapters=...)` makes them, `route` tells which rows
are whose.

    model = fastlora.inject(model, adapters={"a": {"r": 4}, "b": {"r": 16, "lora_dropout": 0.1}}, target_modules=[...])
    with fastlora.route(model, ["a", "b", "b", None]):     # the adapter of each sample of the batch; None: the base
        loss(model(x)).backward()

Each adapter's outputs and gradients are those that it would have alone with its own rows. All share one read of x and
one product with the weight: a bank of adapters is one adapter whose S is block-diagonal (paths/bank.py). On every path
but `cpu` a number that is not finite in one adapter's rows can reach the others' gradients, through products with zero.
On a GPU such calls are launched from Python; a captured graph is not. Under DistributedDataParallel every adapter needs
rows in each batch, or find_unused_parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from threading import get_ident

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

    def __init__(self, names: tuple[str | None, ...], thread: int) -> None:
        self.names, self.thread = names, thread
        self.used = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self.runs = [(name, len(list(samples))) for name, samples in groupby(self.names)]  # of neighbours alike
        self._banks: dict[tuple, Bank] = {}
        self._where: dict[torch.device, dict[str | None, Tensor]] = {}

    @property
    def for_peft(self) -> list[str]:
        """The names as PEFT writes them."""
        return ["__base__" if name is None else name for name in self.names]

    def here(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Those of the batch's adapters that a layer has."""
        return tuple(name for name in self.used if name in adapters)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x (samples, ...) has as many samples as there are names."""
        if x.dim() < 2 or x.shape[0] != len(self.names):
            raise ValueError(f"x has shape {tuple(x.shape)}; its first dimension needs to be the {len(self.names)} "
                             "samples that route was told of")  # fmt: skip

    def where(self, device: torch.device) -> dict[str | None, Tensor]:
        """The samples of each, int64."""
        if device not in self._where:
            found: dict[str | None, list[int]] = {}
            for sample, name in enumerate(self.names):
                found.setdefault(name, []).append(sample)
            self._where[device] = {name: torch.tensor(samples, device=device) for name, samples in found.items()}
        return self._where[device]

    def bank(self, adapters: tuple[str, ...], layers: Sequence[tuple[int, float, float]], x: Tensor) -> Bank:
        """The bank of `adapters`, whose (rank, scaling, dropout probability) are `layers`, for x (samples, ..., K)."""
        each = x.shape[1:-1].numel()
        key = adapters, tuple(layers), each, x.device
        if key not in self._banks:
            place = {name: i for i, name in enumerate(adapters)}
            owners = [place.get(name) for name in self.names]
            self._banks[key] = bank = Bank.of(*zip(*layers, strict=True), owners, each, x.device)
            if x.is_cuda:
                _ = bank.by_row  # now, not in the memory of a graph that is captured later
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
        route.check(x)
        names = route.here(self.adapters)
        if len(names) == 1 and set(route.names) == set(names):  # the base alone is nobody's
            return self.adapters[names[0]](x)
        given, (x, weight, bias) = x, self._base(x)
        if not names:
            y = F.linear(x, dense(weight), bias)
            return y if x is given else y.to(given.dtype)
        A = torch.cat([self.adapters[name].lora_A for name in names])
        B = torch.cat([self.adapters[name].lora_B for name in names], 1)
        y = bank_linear(x, weight, A, B, bias, self._bank(names, x))
        return y if x is given else y.to(given.dtype)

    weight = property(lambda self: self._one.weight)
    bias = property(lambda self: self._one.bias)
    in_features = property(lambda self: self._one.in_features)
    out_features = property(lambda self: self._one.out_features)

    @property
    def _one(self) -> FusedLoRALinear:
        return next(iter(self.adapters.values()))

    def explain(self, x: Tensor) -> Choice:
        """Which path `self(x)` runs, and why."""
        names = _routed(self).here(self.adapters) or tuple(self.adapters)[:1]
        (x, weight, _), bank = self._base(x), self._bank(names, x)
        first = self.adapters[names[0]]
        return explain_call(x, weight, bank.R, x.dtype, first.lora_A.dtype, bank.drops, max(bank.ranks))

    def _base(self, x: Tensor) -> tuple[Tensor, Tensor | Packed, Tensor | None]:
        one = self._one
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
        route.check(x)
        copies = dict(self.copies.items())
        if len({name for name, _ in route.runs}) == len(route.runs):  # each one's samples lie together
            parts = x.split([count for _, count in route.runs])
            parts = [
                copies.get(name, self.base)(own, *args, **kwargs)
                for (name, _), own in zip(route.runs, parts, strict=True)
            ]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        where = route.where(x.device)
        parts = [copies.get(name, self.base)(x[own], *args, **kwargs) for name, own in where.items()]
        return torch.cat(parts)[torch.cat(list(where.values())).argsort()]


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
    before = [layer.__dict__["_route"] for layer in layers]
    new = checked(names, known, before)
    for layer in layers:
        layer.__dict__["_route"] = new
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.__dict__["_route"] = old


_route_of = lru_cache(64)(Route)  # a training loop comes with the same names again, and a route keeps its banks
_captured: set[Route] = set()  # graphs read their banks' tables for as long as they live


def checked(names: Sequence[str | None], known: Iterable[str], outer: Iterable[Route | None]) -> Route:
    """A route by these names, each of which is known; `outer` are the layers' own until now."""
    if any(route is not None and route.thread != get_ident() for route in outer):
        raise RuntimeError("another thread is inside route(model): give each thread a model of its own")
    if not known:
        raise ValueError("model has no adapters to choose from: fastlora.inject(model, adapters={...}) makes them for "
                         "fastlora.route, PEFT and fastlora.peft.patch for fastlora.peft.route")  # fmt: skip
    if not isinstance(names, list | tuple) or not all(name is None or isinstance(name, str) for name in set(names)):
        raise TypeError(f"names must be a list with the adapter of each sample, or None, got {names!r}")
    unknown = sorted(set(names) - {None} - set(known))
    if unknown:
        raise ValueError(f"names holds {unknown[0]!r}; the model has the adapters {', '.join(sorted(known))}")
    return _route_of(tuple(names), get_ident())


def _routed(layer: nn.Module) -> Route:
    route = layer.__dict__["_route"]
    if route is None:
        raise RuntimeError("this model has several adapters: call it inside `with fastlora.route(model, names):`")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured.add(route)
    return route
