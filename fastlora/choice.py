"""Which path runs one call, and why: the one place that selects.

Named (`path=`, FASTLORA_PATH): that path, or an error. Else on a CPU the path that is known to be the fastest; on a GPU
the one that measured fastest there for the bucket of shapes (`fastlora.tuning`); `torch` where no other can run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import check, env, tuning
from fastlora.errors import warn_once
from fastlora.node import NODE
from fastlora.paths import ATEN, PATHS, Path
from fastlora.paths.problem import Problem

_selected: dict[tuple, Path] = {}


@dataclass(frozen=True)
class Choice:
    """The path that runs, by name, and the reason in a sentence; `str()` is both."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def select(x: Tensor, weight: Tensor, lora_A: Tensor, dropout_p: float, path: str | None) -> Path:
    """The path for one call: `path` where one is named, else the choice. Cheap: this runs every call.

    Raises:
        RuntimeError: the path asked for cannot run here.
        ValueError: there is no such path.
    """
    N, K = weight.shape
    sizes = () if x.is_cpu and path is None else (x.shape[:-1], N, K, x.device)  # on a CPU only the rank matters
    key = (path, x.dtype, lora_A.dtype, lora_A.shape[0], dropout_p > 0.0, *sizes)
    chosen = _selected.get(key)
    if chosen is None:
        rank, dropout = lora_A.shape[0], dropout_p > 0.0
        problem = Problem(x.shape[:-1].numel(), N, K, rank, x.dtype, lora_A.dtype, x.device, dropout)
        chosen = _forced(problem, path) if path else PATHS[choose(problem).path]
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return chosen  # what is found then is less than what can be found later
        if len(_selected) >= 4096:  # a server with every length under the sun
            forget()
        _selected[key] = chosen
        if NODE is not None and path is None and chosen is PATHS["cpu"]:
            NODE.allow(x.dtype is torch.bfloat16, lora_A.dtype is torch.bfloat16, rank, dropout)
    return chosen


def forget() -> None:
    """Choose anew from here on: a verdict has changed."""
    _selected.clear()
    if NODE is not None:
        NODE.forget()


def choose(problem: Problem) -> Choice:
    """The path for `problem` when nobody names one. Never raises for an unknown device: `torch` serves everywhere."""
    if problem.device.type == "cpu":
        return _choose_for_cpu(problem)
    if problem.empty:
        return Choice(ATEN.name, "M, N or K is 0: nothing to multiply")
    if not env.autotune():
        return Choice(ATEN.name, "FASTLORA_AUTOTUNE is off, so nothing was measured")
    name = tuning.fastest_path(problem)
    obstacle = None if name == ATEN.name else _obstacle(PATHS[name], problem)
    if obstacle:
        warn_once(
            ("choice", name, obstacle),
            f"fastlora: path {name!r} measured fastest but 'torch' runs instead: {obstacle}",
        )
        return Choice(ATEN.name, f"{name!r} cannot run: {obstacle}")
    return Choice(name, "measured fastest here")


def _choose_for_cpu(problem: Problem) -> Choice:
    reasons = []
    for path in PATHS.values():
        if path.why_slow is None:
            continue
        missing = path.why_not(problem.device, None)
        if missing:
            message = f"fastlora: path 'torch' runs on this CPU, not the faster {path.name!r}: {missing}"
            warn_once((path.name, missing), message)
        obstacle = missing or _obstacle(path, problem)
        slow = None if obstacle else path.why_slow(problem)
        if not obstacle and not slow:
            return Choice(path.name, "measured fastest on a CPU for such ranks and dtypes")
        reasons.append(f"{path.name!r} cannot run: {obstacle}" if obstacle else slow)
    return Choice(ATEN.name, f"the tensors are on the CPU, and {'; '.join(reasons)}")


def explain(layer, x: Tensor) -> Choice:
    """Which path `layer(x)` runs, and why.

    Args:
        layer: a `FusedLoRALinear`, or anything with its attributes; one may answer for itself with a method
            `explain(x)`.
        x: (..., K), as it would be passed.

    Raises:
        TypeError: layer is not a LoRA layer of ours.
        RuntimeError: FASTLORA_PATH names a path that cannot run here.
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
    return choose(problem) if forced is None else Choice(_forced(problem, forced).name, "FASTLORA_PATH asks for it")


def paths(device: torch.device | str | None = None) -> dict[str, str]:
    """Each path, and whether it is usable on `device` (default: the GPU if there is one): `"usable"`, or why not."""
    device = _device(device)
    return {name: why_not(name, device) or "usable" for name in PATHS}


def why_not(name: str, device: torch.device) -> str | None:
    """Why path `name` runs nothing on `device`, or None; ValueError when there is no such path."""
    path = _named(name)
    return path.why_not(device, None) or check.admit(path, device)


def selfcheck(device: torch.device | str | None = None) -> dict[str, str]:
    """Run every path against the reference on `device` (default: the GPU if there is one).

    Returns: per path `"ok"`, or the reason why it cannot run there or what it got wrong.
    """
    device = _device(device)
    results = {path.name: check.recheck(path, device) or "ok" for path in PATHS.values()}
    forget()
    return results


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _named(name: str) -> Path:
    if name not in PATHS:
        whose = "FASTLORA_PATH" if env.forced_path() == name else "path"
        raise ValueError(f"{whose} is {name!r}; it needs to be one of {', '.join(map(repr, PATHS))}, or None to choose")
    return PATHS[name]


def _forced(problem: Problem, name: str) -> Path:
    path = _named(name)
    if problem.empty:
        return ATEN
    obstacle = _obstacle(path, problem)
    if obstacle:
        whose = " (named by FASTLORA_PATH)" if env.forced_path() == name else ""
        raise RuntimeError(f"path {name!r}{whose} cannot run here: {obstacle}")
    return path


def _obstacle(path: Path, problem: Problem) -> str | None:
    return path.why_not(problem.device, problem) or check.admit(path, problem.device)
