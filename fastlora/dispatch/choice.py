"""Which path runs one call, and why."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastlora import env
from fastlora.dispatch import check, registry, table
from fastlora.dispatch.problem import Problem, rides_on_gemm
from fastlora.errors import warn_once


@dataclass(frozen=True)
class Choice:
    """The path that runs, by name, and the reason in a sentence."""

    path: str
    reason: str


@dataclass(frozen=True)
class Explanation(Choice):
    """What `explain` says; `str()` of it is the sentence."""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"



def select(x: Tensor, weight: Tensor, lora_A: Tensor, dropout_p: float, path: str | None) -> ModuleType:
    """The path module for one call: `path` or FASTLORA_PATH when given, else the choice. Cheap: this runs every call.

    Raises:
        RuntimeError: the path asked for cannot run here.
    """
    if path is None:
        path = env.forced_path()
        if path is None and x.is_cpu:
            key = (x.dtype, lora_A.dtype, lora_A.shape[0], dropout_p > 0.0)
            return registry.selected.get(key) or _select_on_cpu(x, weight, key)
    N, K = weight.shape
    dropout = dropout_p > 0.0
    key = (path, x.shape[:-1], N, K, lora_A.shape[0], x.dtype, lora_A.dtype, x.device, dropout)
    chosen = registry.selected.get(key)
    if chosen is None:
        problem = Problem(x.shape[:-1].numel(), N, K, lora_A.shape[0], x.dtype, lora_A.dtype, x.device, dropout)
        chosen = registry.load(_forced(problem, path) if path else choose(problem).path)
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            if len(registry.selected) >= 4096:  # a server with every length under the sun
                registry.selected.clear()
            registry.selected[key] = chosen
    return chosen


TINY = 1 << 21  # M * N * K: some 30 microseconds of a core


def is_tiny(x: Tensor, weight: Tensor, lora_A: Tensor, scaling: float, dropout_p: float) -> bool:
    """Whether ATen's own autograd nodes beat every path: three of them cost less than one of Python's.

    So it is for a small layer on a CPU that drops nothing and whose x asks for no gradient (the first layer of a small
    model). They keep what the paths keep: x and S. So it is without gradients too, for the same bits in both. Not for a
    scaling that no GEMM takes.
    """
    return (
        dropout_p == 0.0
        and rides_on_gemm(scaling)
        and not x.requires_grad
        and x.is_cpu
        and x.dim() == 2
        and x.shape[0] * weight.numel() <= TINY
        and not weight.requires_grad
        and x.dtype is lora_A.dtype
        and x.dtype is not torch.float16
        and env.forced_path() is None
    )


def _select_on_cpu(x: Tensor, weight: Tensor, key: tuple) -> ModuleType:
    """There the path depends on no size but the rank's."""
    dtype, adapter_dtype, R, dropout = key
    problem = Problem(x.shape[:-1].numel(), *weight.shape, R, dtype, adapter_dtype, x.device, dropout)
    chosen = registry.load(choose(problem).path)
    registry.selected[key] = chosen
    if chosen.NAME == "cpu":
        registry.selected[chosen.node_key(*key)] = chosen
    return chosen


def choose(problem: Problem) -> Choice:
    """The path for `problem` when nobody names one. Never raises for an unknown device: `torch` serves everywhere."""
    device = problem.device
    if device.type == "cpu":
        return _choose_for_cpu(problem)
    if problem.empty:
        return Choice("torch", "M, N or K is 0: nothing to multiply")
    measured = table.lookup(problem)
    if measured is None:
        return Choice(
            "torch",
            f"no measurements for {table.device_class(device)}, so the safe default; FASTLORA_AUTOTUNE=1 measures",
        )
    name, source = measured
    if name == "torch":
        return Choice("torch", f"measured fastest ({source})")
    obstacle = _obstacle(name, problem)
    if obstacle:
        warn_once(
            ("choice", name, obstacle),
            f"fastlora: path {name!r} would be fastest ({source}) but 'torch' runs instead: {obstacle}",
        )
        return Choice("torch", f"{name!r} cannot run: {obstacle}")
    return Choice(name, f"measured fastest ({source})")


CPU_RANK = 32  # above it ATen's GEMMs make up for the passes that they take, where nothing is dropped


def _choose_for_cpu(problem: Problem) -> Choice:
    missing = registry.load("cpu").unavailable(problem.device)
    if missing:
        warn_once(("cpu", missing), f"fastlora: path 'torch' runs on this CPU, not the faster 'cpu': {missing}")
    obstacle = missing or _obstacle("cpu", problem)
    if obstacle:
        return Choice("torch", f"the tensors are on the CPU, and 'cpu' cannot run: {obstacle}")
    unmeasured = registry.load("cpu").unmeasured()
    if unmeasured:
        return Choice("torch", f"the tensors are on the CPU, and 'cpu' has not been measured on {unmeasured}")
    if problem.R > CPU_RANK and not problem.dropout:
        return Choice("torch", f"measured fastest on a CPU for R above {CPU_RANK} without dropout")
    return Choice("cpu", f"measured fastest on a CPU for R up to {CPU_RANK}, and for any with dropout")


def explain(layer, x: Tensor) -> Explanation:
    """Which path `layer(x)` runs, and why.

    Args:
        layer: a `FusedLoRALinear`, or anything with its attributes; one may answer for itself with a method
            `explain(x)`.
        x: (..., K), as it would be passed.

    Raises:
        TypeError: layer is not a LoRA layer of ours.
    """
    own = getattr(layer, "explain", None)
    if callable(own):
        return own(x)
    if not isinstance(getattr(layer, "lora_A", None), Tensor):
        raise TypeError(f"layer is {type(layer).__name__}; it needs to be a FusedLoRALinear or a patched PEFT layer")
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    (N, K), dropout = layer.weight.shape, bool(layer.training and layer.lora_dropout > 0.0)
    problem = Problem(x.shape[:-1].numel(), N, K, layer.lora_A.shape[0], dtype, layer.lora_A.dtype, x.device, dropout)
    forced = env.forced_path()
    scaling = 1.0 if isinstance(layer.scaling, Tensor) else layer.scaling  # `lora_linear` multiplies lora_B by a tensor
    if is_tiny(x, layer.weight, layer.lora_A, scaling, float(dropout)):
        return Explanation("torch", "so small a layer, whose x asks for no gradient, is fastest in ATen's own nodes")
    if forced is None:
        return Explanation(*vars(choose(problem)).values())
    return Explanation(_forced(problem, forced), "FASTLORA_PATH asks for it")


def paths(device: torch.device | str | None = None) -> dict[str, str]:
    """Each path, and whether it is usable on `device` (default: the GPU if there is one): `"usable"`, or why not."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        name: registry.load(name).unavailable(device) or check.admit(name, device) or "usable"
        for name in registry.NAMES
    }


def _forced(problem: Problem, path: str) -> str:
    if path not in registry.NAMES:
        registry.load(path)
    if problem.empty:
        return "torch"
    obstacle = _obstacle(path, problem)
    if obstacle:
        whose = " (named by FASTLORA_PATH)" if env.forced_path() == path else ""
        raise RuntimeError(f"path {path!r}{whose} cannot run here: {obstacle}")
    return path


def _obstacle(name: str, problem: Problem) -> str | None:
    module = registry.load(name)
    return module.unavailable(problem.device) or module.unsupported(problem) or check.admit(name, problem.device)
