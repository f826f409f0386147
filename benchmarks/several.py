"""Cases of several at once: adapters over one weight, each with its own rows, and projections that share x.

Those against whom a case is measured compute them one after the other, and put nothing together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from fastlora import lora_linears, roofline
from fastlora.functional import bank_linear
from fastlora.paths.bank import Bank
from fastlora.roofline import Pass, Passes, Work

SCALING = 2.0


class Parts:
    """One set of inputs `t` as several: x, dy and (weight, lora_A, lora_B, bias, scaling) of each."""

    def __init__(self, case: Case, t) -> None:
        n, rows = max(case.adapters, case.projections), case.adapters > 1
        self.t, self.case = t, case
        self.x = [part.detach().requires_grad_() for part in t.x.chunk(n)] if rows else [t.x] * n
        self.dy = list(t.dy.chunk(n)) if rows else [t.dy] * n
        weights = [t.weight] * n if rows else [_like(t.weight) for _ in range(n)]
        self.each = [(weight, _like(t.lora_A), _like(t.lora_B), t.bias, SCALING) for weight in weights]
        self.adapters = tuple(adapter for one in self.each for adapter in one[1:3])

    def apart(self, function: Callable) -> tuple[Callable, tuple, object]:
        """What a call computes, the tensors whose gradients it asks for, and dy: by `function`, a `lora_linear`."""

        def call() -> tuple[Tensor, ...]:
            return tuple(function(x, *one, self.case.dropout) for x, one in zip(self.x, self.each, strict=True))

        return call, (*dict.fromkeys(self.x), *self.adapters), self.dy

    def bare(self) -> tuple[Callable, tuple, object]:
        """The frozen products: one for all adapters, one for each projection."""
        weights = [one[0] for one in self.each][: self.case.projections]
        dy = self.dy if self.case.projections > 1 else [self.t.dy]
        return lambda: tuple(F.linear(self.t.x, weight, self.t.bias) for weight in weights), (self.t.x,), dy

    def together(self) -> tuple[Callable, tuple, object]:
        """Ours: a bank of adapters, or `lora_linears`."""
        leaves, case = (self.t.x, *self.adapters), self.case
        if case.projections > 1:
            return lambda: tuple(lora_linears(self.t.x, self.each, case.dropout)), leaves, self.dy
        n = case.adapters
        bank = Bank.of((case.R,) * n, (SCALING,) * n, (case.dropout,) * n, range(n), case.M // n, self.t.x.device)

        def call() -> Tensor:
            A, B = torch.cat(self.adapters[::2]), torch.cat(self.adapters[1::2], 1)
            return bank_linear(self.t.x, self.t.weight, A, B, self.t.bias, bank)

        return call, leaves, self.t.dy


def passes(case: Case, name: str, work: Work, plan: Callable[[Work], Passes]) -> Passes:
    """The traffic model's passes of `name`, whose plan for one layer is `plan`; a path of ours computes together."""
    n, ours = max(case.adapters, case.projections), name in roofline.PATHS
    if case.projections > 1:
        return (roofline.together(name, [work] * n), []) if ours else (_sums(work, n), _times(n, plan(work)))
    if name == "bare" or name == "cpu":  # which gives each row its own ranks alone
        return plan(work)
    return plan(replace(work, R=work.R * n)) if ours else ([], _times(n, plan(replace(work, M=work.M // n))))


def _times(n: int, passes: Passes) -> list[Pass]:
    return [one for direction in passes for one in direction] * n


def _sums(work: Work, n: int) -> list[Pass]:
    """Autograd's, of n gradients of x."""
    return [Pass(3.0 * work.M * work.K * work.size)] * (n - 1)


def _like(t: Tensor) -> Tensor:
    return (torch.randn_like(t) * t.detach().float().std()).to(t.dtype).detach().requires_grad_(t.requires_grad)
