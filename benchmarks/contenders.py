"""Who is measured: the floor, what people use today, each of our paths, and what we choose.

To add a contender: write a function with the arguments of `fastlora.lora_linear` up to `dropout_p` (or one that makes
`Call`s of a case), and give it a line in CONTENDERS below: its name, what calls it, where it runs, and in which modes.
A rival gets a colour, and then stands in tables, in the figure and among those to whom shapes are lost. Raise
`Unavailable` where it cannot run. A plan in benchmarks/model.py adds rates and a prediction; without one its rows lack
them. Tests: tests/benchmarks/test_suite.py takes all that is named here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import COMPILED, GRAPH, PLAIN, Case
from benchmarks.measure import ROOT
from benchmarks.several import Parts
from fastlora import lora_linear, reference, tuning
from fastlora.choice import choose
from fastlora.linear import EagerLoRALinear
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem

SCALING = 2.0
PEERS = ROOT / ".peers"  # ignored by git: a checkout of a peer's sources is measured when it lies here


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclass
class Inputs:
    """One set of tensors of a case: x (M, K), weight (N, K), bias (N,), lora_A (R, K), lora_B (N, R), dy (M, N)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


@dataclass
class Call:
    """A layer applied to one set of inputs, and the tensors whose gradients a training step asks for."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def train(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.dy)


def draw(case: Case, count: int, device: torch.device, seed: int = 0) -> list[Inputs]:
    """`count` sets of random inputs; B is not zero, as it is not after the first step."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device, generator=generator) * scale).to(case.torch_dtype)

    M, N, K, R = case.M, case.N, case.K, case.R
    return [
        Inputs(
            normal(M, K).requires_grad_(),
            normal(N, K, scale=K**-0.5),
            normal(N),
            normal(R, K, scale=K**-0.5).requires_grad_(),
            normal(N, R).requires_grad_(),
            normal(M, N),
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Contender:
    """Who is measured. `calls`: (case, sets of inputs, whether compiled) -> a call for each set, or `Unavailable`;
    `where`: on which cases and devices; `colour`: a rival's in the figure, else None; `ours`: fastlora's; `variants`:
    also over a quantised base and with DoRA; `several`: several adapters, or projections of one x."""

    name: str
    calls: Callable[[Case, list[Inputs], bool], list[Call]]
    where: Callable[[Case, torch.device], bool] = lambda case, device: True
    modes: tuple[str, ...] = (PLAIN,)
    colour: str | None = None
    ours: bool = False
    variants: bool = False
    several: bool = False


def names(case: Case, device: torch.device) -> list[str]:
    """The contenders of a case on a device, the floor first; those that cannot run say so when they are built."""
    takes = {name: one.several if case.several else case.plain or one.variants for name, one in CONTENDERS.items()}
    return [name for name, one in CONTENDERS.items() if takes[name] and one.where(case, device)]


def chosen_path(case: Case, device: torch.device, captured: bool = False) -> str:
    """The path that `fastlora` takes for a case when none is forced; in a capture, where that was measured."""
    M, N, K, R, dtype = case.M, case.N, case.K, case.R, case.torch_dtype
    dropout = case.dropout > 0 and not case.dora  # which drops elements of x itself
    R, bank = R * (1 if device.type == "cpu" else case.adapters), case.adapters > 1
    problem = Problem(M, N, K, R, dtype, dtype, device, dropout, bank=bank)
    measured = tuning.known(problem) if captured else None
    return measured.winner(captured=True).name if measured else choose(problem).path


def _layer(function: Callable, float32: bool = False) -> Callable[[Case, list[Inputs], bool], list[Call]]:
    """The calls of a function that takes the arguments of `lora_linear`; `float32`: with adapters of that dtype."""

    def calls(case: Case, sets: list[Inputs], compiled: bool) -> list[Call]:
        run, made = torch.compile(function, dynamic=False) if compiled else function, []
        for t in sets:
            A, B = t.lora_A, t.lora_B
            if float32:
                A, B = (adapter.detach().float().requires_grad_() for adapter in (A, B))
            arguments = (t.x, t.weight, A, B, t.bias, SCALING, case.dropout)
            made.append(Call(functools.partial(run, *arguments), (t.x, A, B), t.dy))
        return made

    return calls


def _bare(case: Case, sets: list[Inputs], compiled: bool) -> list[Call]:
    if case.several:
        return [Call(*Parts(case, t).bare()) for t in sets]
    if case.base:
        return [Call(functools.partial(_base(case, t), t.x), (t.x,), t.dy) for t in sets]
    run = torch.compile(F.linear, dynamic=False) if compiled else F.linear
    return [Call(functools.partial(run, t.x, t.weight, t.bias), (t.x,), t.dy) for t in sets]


def _base(case: Case, t: Inputs) -> torch.nn.Module:
    """The frozen layer: an `nn.Linear`, or bitsandbytes' layer that computes in the case's dtype."""
    if case.base:
        try:
            import bitsandbytes
        except ImportError as error:
            raise Unavailable(f"bitsandbytes: {error}") from None
        layer = bitsandbytes.nn.Linear4bit(case.K, case.N, True, case.torch_dtype, True, case.base)
        layer = layer.to(case.torch_dtype)
        layer.load_state_dict({"weight": t.weight, "bias": t.bias})
        return layer.requires_grad_(False).to(t.x.device)
    layer = torch.nn.Linear(case.K, case.N, device="meta", dtype=case.torch_dtype)
    layer.weight = torch.nn.Parameter(t.weight, requires_grad=False)
    layer.bias = torch.nn.Parameter(t.bias, requires_grad=False)
    return layer


def _eager(case: Case, sets: list[Inputs], compiled: bool) -> list[Call]:
    """The reference; over a quantised base with a weight that is dequantised for each call, and kept for backward."""
    if case.several:
        return _apart(reference.lora_linear)(case, sets, compiled)
    if case.plain:
        return _layer(reference.lora_linear)(case, sets, compiled)
    made = []
    for t in sets:
        layer = EagerLoRALinear.from_linear(_base(case, t), r=case.R, scaling=SCALING, use_dora=case.dora)
        layer.lora_dropout = case.dropout
        leaves = (t.x, layer.lora_A, layer.lora_B, *([layer.lora_magnitude_vector] if case.dora else ()))
        made.append(_trained(layer, t, leaves))
    return made


def _trained(layer: torch.nn.Module, t: Inputs, leaves: tuple[Tensor, ...]) -> Call:
    with torch.no_grad():
        leaves[1].copy_(t.lora_A)
        leaves[2].copy_(t.lora_B)
    return Call(functools.partial(layer.train(), t.x), leaves, t.dy)


def _peft(case: Case, sets: list[Inputs], compiled: bool, float32: bool = False, patched: bool = False) -> list[Call]:
    """PEFT's own layer, put by PEFT itself around the frozen one; `patched` by fastlora."""
    try:
        from peft import LoraConfig, get_peft_model

        from fastlora.peft import patch
    except ImportError as error:
        raise Unavailable(f"peft: {error}") from None
    config = LoraConfig(
        r=case.R, lora_alpha=SCALING * case.R, lora_dropout=case.dropout, target_modules=["linear"], bias="none",
        use_dora=case.dora,
    )  # fmt: skip
    made = []
    for t in sets:
        holder = torch.nn.Module()
        holder.linear, holder.is_loaded_in_4bit = _base(case, t), bool(case.base)
        layer = get_peft_model(holder, config, autocast_adapter_dtype=float32).base_model.model.linear
        if patched:
            patch(layer)
        leaves = (t.x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if case.dora:
            leaves += (layer.lora_magnitude_vector["default"].weight,)
        made.append(_trained(layer, t, leaves))
    return made


def _fastlora(case: Case, sets: list[Inputs], compiled: bool) -> list[Call]:
    """Our function; a variant as PEFT's users have it, by `fastlora.peft.patch`."""
    if case.several:
        return [Call(*Parts(case, t).together()) for t in sets]
    return _layer(lora_linear)(case, sets, compiled) if case.plain else _peft(case, sets, compiled, patched=True)


def _apart(function: Callable) -> Callable[[Case, list[Inputs], bool], list[Call]]:
    """Several by a call of `function` each."""
    return lambda case, sets, compiled: [Call(*Parts(case, t).apart(function)) for t in sets]


def _without_dora(case: Case, sets: list[Inputs], compiled: bool, patched: bool = False) -> list[Call]:
    """Plain LoRA beside DoRA: what DoRA's own share is measured against."""
    return _peft(replace(case, dora=False), sets, compiled, patched=patched)


class _Optimised(torch.autograd.Function):
    """What a careful user writes: two GEMMs, `addmm_` in place, no weight gradient, S kept, the mask stored."""

    @staticmethod
    def call(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
        return _Optimised.apply(x, weight, lora_A, lora_B, bias, scaling, dropout_p)

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling, dropout_p):
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        y = F.linear(x, weight, bias)
        S = dropped @ lora_A.t()
        y.addmm_(S, lora_B.t(), alpha=scaling)
        ctx.save_for_backward(dropped, weight, lora_A, lora_B, S, mask)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, weight, lora_A, lora_B, S, mask = ctx.saved_tensors
        dS = dy @ lora_B
        dS *= ctx.scaling
        dB = dy.t() @ S
        dB *= ctx.scaling
        dA = dS.t() @ dropped
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dS, lora_A)
        else:
            dx += torch.ops.aten.native_dropout_backward(dS @ lora_A, mask, 1.0 / (1.0 - ctx.dropout_p))
        return dx, None, dA, dB, None, None, None


@functools.cache
def _lorafusion() -> Callable:
    checkout = str(PEERS / "lorafusion")
    if checkout not in sys.path:
        sys.path.append(checkout)
    if "loguru" not in sys.modules and importlib.util.find_spec("loguru") is None:  # it only logs
        sys.modules["loguru"] = types.SimpleNamespace(logger=logging.getLogger("lorafusion"))
    try:
        return importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    except Exception as error:  # a peer's import may fail in any way, and the run goes on without it
        raise Unavailable(f"lorafusion: {type(error).__name__}: {error}") from None


def _peer(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
    """LoRAFusion's fused layer, from a checkout in `.peers/lorafusion`; it takes three-dimensional inputs only."""
    return _lorafusion()(x[None], weight, lora_A, lora_B, scaling, 1, dropout_p, bias)[0]


def _narrow(case: Case, device: torch.device) -> bool:
    return case.dtype != "float32"


def _several(case: Case, device: torch.device) -> bool:
    return case.several


def _dora(case: Case, device: torch.device) -> bool:
    return case.dora


def _path(name: str) -> Contender:
    def where(case: Case, device: torch.device) -> bool:
        return name == "torch" or (name == "cpu") == (device.type == "cpu")

    return Contender(name, _layer(functools.partial(lora_linear, path=name)), where, ours=True)


_ALL = (PLAIN, COMPILED, GRAPH)
CONTENDERS: dict[str, Contender] = {
    one.name: one
    for one in (
        Contender("bare", _bare, modes=_ALL, variants=True, several=True),
        Contender("eager", _eager, modes=_ALL, colour="#d1495b", variants=True, several=True),
        Contender("peft", _peft, colour="#edae49", variants=True),
        Contender("peft-lora", _without_dora, _dora, variants=True),
        Contender("peft-float32", functools.partial(_peft, float32=True), _narrow, colour="#c98b2b"),
        Contender("optimised", _layer(_Optimised.call), modes=(PLAIN, GRAPH), colour="#66a182"),
        Contender(
            "lorafusion",
            _layer(_peer),
            lambda case, device: device.type == "cuda" and (PEERS / "lorafusion").exists(),
            colour="#8d6a9f",
        ),
        *map(_path, PATHS),
        Contender("fastlora-float32", _layer(lora_linear, float32=True), _narrow, ours=True),
        Contender("fastlora-lora", functools.partial(_without_dora, patched=True), _dora, ours=True, variants=True),
        Contender("fastlora-apart", _apart(lora_linear), _several, (PLAIN, GRAPH), ours=True, several=True),
        Contender("fastlora", _fastlora, modes=_ALL, ours=True, variants=True, several=True),
    )
}
RIVALS = tuple(name for name, one in CONTENDERS.items() if one.colour)
