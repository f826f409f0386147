"""Who is measured: the floor, what people use today, each of our paths, and what we choose."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import ROOT
from fastlora import lora_linear, reference
from fastlora.dispatch import Problem, choose, select
from fastlora.dispatch.registry import NAMES as PATHS

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


def calls(name: str, case: Case, sets: list[Inputs], compiled: bool = False) -> list[Call]:
    """The calls of contender `name`, one for each set of inputs.

    Raises:
        Unavailable: it cannot run this case here.
    """
    if name in ("peft", "peft-float32"):
        if compiled:
            raise Unavailable("measured without torch.compile only")
        return _peft(case, sets, adapter_float32=name == "peft-float32")
    if name == "bare":
        run = torch.compile(F.linear, dynamic=False) if compiled else F.linear
        return [Call(lambda t=t: run(t.x, t.weight, t.bias), (t.x,), t.dy) for t in sets]
    run = _function(name)
    if compiled:
        run = torch.compile(run, dynamic=False)
    made = []
    for t in sets:
        A, B = t.lora_A, t.lora_B
        if name == "fastlora-float32":
            A, B = (adapter.detach().float().requires_grad_() for adapter in (A, B))
        made.append(
            Call(
                lambda t=t, A=A, B=B: run(t.x, t.weight, A, B, t.bias, SCALING, case.dropout),
                (t.x, A, B),
                t.dy,
            )
        )
    return made


def names(case: Case, device: torch.device) -> list[str]:
    """The contenders of a case on a device, the floor first; those that cannot run say so when they are built."""
    wide = [] if case.dtype == "float32" else ["peft-float32", "fastlora-float32"]
    paths = ["cpu"] if device.type == "cpu" else [path for path in PATHS if path not in ("torch", "cpu")]
    peers = ["lorafusion"] if device.type == "cuda" and (PEERS / "lorafusion").exists() else []
    return ["bare", "eager", "peft", "optimised", *wide, "torch", *paths, "fastlora", *peers]


def chosen_path(case: Case, device: torch.device) -> str:
    """The path that `fastlora` takes for a case when none is forced."""
    M, N, K, R, dtype = case.M, case.N, case.K, case.R, case.torch_dtype
    return choose(Problem(M, N, K, R, dtype, dtype, device, case.dropout > 0)).path


def choosing_seconds(device: torch.device, calls: int = 2000) -> float:
    """What choosing a path adds to a call whose shape has been seen before: the least mean of five runs, in seconds."""
    case = Case("tiny", 64, 100, 128, 2, "float32", 0.0)
    (t,) = draw(case, 1, device)
    select(t.x, t.weight, t.lora_A, 0.0, None)
    means = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            select(t.x, t.weight, t.lora_A, 0.0, None)
        means.append((time.perf_counter() - start) / calls)
    return min(means)


def ours(name: str) -> bool:
    """True for a contender that is fastlora's."""
    return name.startswith("fastlora") or name in PATHS


def _function(name: str) -> Callable:
    """The function behind a name; its arguments are those of `fastlora.lora_linear` up to `dropout_p`."""
    if name in PATHS:
        return lambda *arguments: lora_linear(*arguments, path=name)
    if name == "lorafusion":
        return _lorafusion()
    return {"eager": reference.lora_linear, "optimised": _Optimised.call}.get(name, lora_linear)


def _peft(case: Case, sets: list[Inputs], adapter_float32: bool) -> list[Call]:
    """PEFT's own `lora.Linear`, put by PEFT itself around a frozen `nn.Linear`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Unavailable(f"peft: {error}") from None
    config = LoraConfig(
        r=case.R, lora_alpha=SCALING * case.R, lora_dropout=case.dropout, target_modules=["linear"], bias="none"
    )
    made = []
    for t in sets:
        holder = torch.nn.Module()
        holder.linear = torch.nn.Linear(case.K, case.N, device="meta", dtype=case.torch_dtype)
        holder.linear.weight = torch.nn.Parameter(t.weight, requires_grad=False)
        holder.linear.bias = torch.nn.Parameter(t.bias, requires_grad=False)
        layer = get_peft_model(holder, config, autocast_adapter_dtype=adapter_float32).base_model.model.linear
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(t.lora_A)
            B.copy_(t.lora_B)
        layer.train()
        made.append(Call(lambda t=t, layer=layer: layer(t.x), (t.x, A, B), t.dy))
    return made


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


def _lorafusion() -> Callable:
    """The peer's fused layer, from a checkout in `.peers/lorafusion`; it takes three-dimensional inputs only."""
    checkout = str(PEERS / "lorafusion")
    if checkout not in sys.path:
        sys.path.append(checkout)
    if importlib.util.find_spec("loguru") is None:  # it only logs
        sys.modules["loguru"] = types.SimpleNamespace(logger=logging.getLogger("lorafusion"))
    try:
        fused = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    except Exception as error:  # a peer's import may fail in any way, and the run goes on without it
        raise Unavailable(f"lorafusion: {type(error).__name__}: {error}") from None

    def run(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
        return fused(x[None], weight, lora_A, lora_B, scaling, 1, dropout_p, bias)[0]

    return run
