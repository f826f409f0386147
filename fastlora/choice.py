"""Which path runs one call, and why: the one place that selects.

Named (`path=`, FASTLORA_PATH): that path, or an error. Else on a CPU the path that is known to be the fastest; on a GPU
the path and tiles that measured fastest there for the bucket of shapes (`fastlora.tuning`). Where nothing may be timed
(while a graph is captured, in a compiler, under deterministic algorithms, with FASTLORA_AUTOTUNE=0) the one that must
be the fastest by arithmetic (`fastlora.roofline`) of those that the self-check has admitted. Else `torch`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import check, env, roofline, tuning
from fastlora.base_layer import compute_dtype
from fastlora.errors import warn_once
from fastlora.kernels.tiles import tf32
from fastlora.node import NODE
from fastlora.paths import ATEN, PATHS, Path
from fastlora.paths.problem import Layout, Problem, rows

RETRY_S = 60.0  # after which what failed in passing (no memory, a lock that is held) is tried again
_selected: dict[tuple, Path] = {}
_later: dict[tuple, float] = {}


@dataclass(frozen=True)
class Choice:
    """The path that runs, with its tiles, and the reason in a sentence; `table`: what was measured. `str()` is all."""

    runs: Path | str  # a str: what is none of ours, "peft"
    reason: str
    table: str = ""
    passing: bool = False  # what stood in the way (no memory, say) may be gone later

    @property
    def path(self) -> str:
        return self.runs if isinstance(self.runs, str) else self.runs.name

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + f"\n{self.table}" * bool(self.table)

    __repr__ = __str__


def select(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    path: str | None,
    in_backward: bool = False,
    bank: int = 0,
) -> Path:
    """The path for one call: `path` where one is named, else the choice. Cheap: this runs every call.

    `in_backward`: forward has chosen already; what it chose is not to be found out again, only looked up. `bank`: of
    several adapters, the ranks of the largest.

    Raises:
        RuntimeError: the path asked for cannot run here.
        ValueError: there is no such path.
    """
    N, K = weight.shape
    R, dropout = lora_A.shape[0], dropout_p > 0.0
    key = path, x.dtype, lora_A.dtype, R, dropout, bank
    if not x.is_cpu or path is not None:  # on a CPU only the rank matters
        key = (*key, x.shape, N, K, x.device, _lies(x), _lies(weight), x.is_cuda and (nothing_timed(), tf32()))
    chosen = _selected.get(key)
    if chosen is None:
        problem = _problem(x, weight, R, x.dtype, lora_A.dtype, dropout, bank)
        if path:
            chosen = _forced(problem, path)
        elif in_backward and x.is_cuda:  # autograd's thread may not wait for a timing that needs it
            return _guess(problem, "backward is under way").runs
        elif _later.get(key, 0.0) > time.monotonic():
            return ATEN
        else:
            choice = choose(problem)
            if choice.passing:
                _later[key] = time.monotonic() + RETRY_S
                return choice.runs
            chosen = choice.runs
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return chosen  # what is found then is less than what can be found later
        if len(_selected) >= 4096:  # a server with every length under the sun
            forget()
        _selected[key] = chosen
        if NODE is not None and path is None and not bank and isinstance(weight, Tensor):
            NODE.choose(chosen, x, weight, lora_A, dropout)
    return chosen


def forget() -> None:
    """Choose anew from here on: a verdict has changed."""
    _selected.clear()
    _later.clear()
    if NODE is not None:
        NODE.forget()


def choose(problem: Problem) -> Choice:
    """The path for `problem` when nobody names one. Never raises for an unknown device: `torch` serves everywhere."""
    if problem.device.type == "cpu":
        return _choose_for_cpu(problem)
    if problem.empty:
        return Choice(ATEN, "M, N or K is 0: nothing to multiply")
    if problem.device.type != "cuda":
        return Choice(ATEN, f"no other path is for device type {problem.device.type!r}")
    forbidden = nothing_timed()
    if forbidden:
        return _guess(problem, forbidden)
    row = tuning.measured(problem)
    if row is None:
        return Choice(ATEN, "the paths could not be timed: no memory, or another process is at it", passing=True)
    plain, captured = row.winner(False), row.winner(True)
    obstacle = _obstacle(plain, problem)
    if obstacle:
        message = f"fastlora: path {plain.name!r} measured fastest but 'torch' runs instead: {obstacle}"
        warn_once(("choice", plain.name, obstacle), message)
        return Choice(
            ATEN, f"{plain.name!r} cannot run: {obstacle}", str(row), passing=obstacle.startswith("OutOfMemory")
        )
    if plain.label != captured.label and not _obstacle(captured, problem):
        tuning.load(captured, problem)  # so that a graph may be captured with it
    return Choice(plain, "measured fastest here", str(row))


def nothing_timed() -> str | None:
    """Why nothing may be timed now, or None: cheap, for it is asked in every call on a GPU."""
    if torch.cuda.is_current_stream_capturing():
        return "a graph is captured"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on"
    if torch.compiler.is_compiling():
        return "a compiler is at work"
    return None if env.autotune() else "FASTLORA_AUTOTUNE is off"


def _guess(problem: Problem, why: str) -> Choice:
    """The best of what may run without anything compiled, checked or timed; never raises."""
    captured = why == "a graph is captured"
    row = tuning.known(problem)
    for path in [row.winner(captured), row.winner(not captured)] if row else []:
        if check.admitted(path, problem, here=captured):
            return Choice(path, "measured fastest here", str(row))
    found = {}
    for path in PATHS.values():
        with suppress(Exception):  # whatever planning a launch raises
            if not path.why_not(problem.device, problem):
                path = tuning.pin(path, problem)
                if check.admitted(path, problem, here=captured):
                    found[path] = roofline.predict(path.name, problem, captured, NODE is not None)
    best, names = min(found, key=found.__getitem__, default=ATEN), ", ".join(path.name for path in found)
    return Choice(best, f"{why}, so nothing was measured; fastest by prediction of those admitted ({names})")


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
            return Choice(path, "known to be the fastest on a CPU for such ranks and dtypes")
        reasons.append(f"{path.name!r} cannot run: {obstacle}" if obstacle else slow)
    return Choice(ATEN, f"the tensors are on the CPU, and {'; '.join(reasons)}")


def explain(layer, x: Tensor) -> Choice:
    """Which path `layer(x)` runs, and why.

    Args:
        layer: a `FusedLoRALinear`, or anything with its attributes; one may answer for itself with a method
            `explain(x)`.
        x: (..., K), as it would be passed.

    Raises:
        TypeError, ValueError: layer is not a LoRA layer of ours, or x does not fit it.
        RuntimeError: FASTLORA_PATH names a path that cannot run here.
    """
    own = getattr(layer, "explain", None)
    choice = own(x) if callable(own) else _explain(layer, x)
    group = getattr(layer, "_siblings", None)  # fastlora.siblings
    names = group.names(layer) if group is not None and choice.path != "peft" else ()
    if not names:
        return choice
    return replace(choice, reason=f"{choice.reason}; with those that read the same x: {', '.join(names)}")


def _explain(layer, x: Tensor) -> Choice:
    if not isinstance(getattr(layer, "lora_A", None), Tensor):
        raise TypeError(f"layer is {type(layer).__name__}; it needs to be a FusedLoRALinear or a patched PEFT layer")
    if getattr(layer, "merged", False):
        return Choice(ATEN, "the layer is merged: one plain linear layer")
    quantised = getattr(layer, "_quantised", None)
    dtype = x.dtype if quantised is None else compute_dtype(quantised, x)
    if torch.is_autocast_enabled(x.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    (N, R), K = layer.lora_B.shape, layer.lora_A.shape[1]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension needs to be the layer's {K}")
    dora = getattr(layer, "lora_magnitude_vector", None) is not None  # which drops elements of x itself
    dropout = bool(layer.training and layer.lora_dropout > 0.0 and not dora)
    plain = layer.weight.shape == (N, K) and type(layer.weight) in (Tensor, torch.nn.Parameter)
    weight = layer.weight if plain else torch.empty((N, K), device="meta")  # a quantised one is made dense
    return explain_call(x, weight, R, dtype, layer.lora_A.dtype, dropout)


def explain_call(x: Tensor, weight: Tensor, R: int, dtype, adapter_dtype, dropout: bool, bank: int = 0) -> Choice:
    """The choice for one call of x (..., K), computed in `dtype`."""
    problem = _problem(x, weight, R, dtype, adapter_dtype, dropout, bank)
    forced = env.forced_path()
    return choose(problem) if forced is None else Choice(_forced(problem, forced), "FASTLORA_PATH asks for it")


def paths(device: torch.device | str | None = None) -> dict[str, str]:
    """Each path, and whether it is usable on `device` (default: the GPU if there is one): `"usable"`, or why not."""
    device = _device(device)
    return {name: why_not(name, device) or "usable" for name in PATHS}


def why_not(name: str, device: torch.device) -> str | None:
    """Why path `name` runs nothing on `device`, or None; ValueError when there is no such path."""
    path = _named(name)
    return path.why_not(device, None) or check.verdict(path, device)


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


def _problem(x: Tensor, weight: Tensor, R: int, dtype, adapter_dtype, dropout: bool, bank: int = 0) -> Problem:
    N, K = weight.shape
    if not x.is_cuda:
        return Problem(x.shape[:-1].numel(), N, K, R, dtype, adapter_dtype, x.device, dropout, bank=bank)
    x, plain = rows(x), ((K, 1), 0)
    strides, offset = _lies(x)
    if strides[1] == 1 and strides[0] > K:  # one bucket for rows that lie as far apart, to kernels
        strides = (K + (strides[0] - K) % 16, 1)
    layout = Layout(strides, offset, *(_lies(weight) or plain))
    device, layout = check.indexed(x.device), None if layout == Layout(*plain, *plain) else layout
    precise = dtype is torch.float32 and tf32()
    return Problem(x.shape[0], N, K, R, dtype, adapter_dtype, device, dropout, layout, precise, min(bank, 1))


def problem_of(x: Tensor, weight: Tensor, lora_A: Tensor, dropout_p: float) -> Problem:
    """The problem of one call."""
    return _problem(x, weight, lora_A.shape[0], x.dtype, lora_A.dtype, dropout_p > 0.0)


def _lies(t: Tensor) -> tuple | None:
    """Strides, and the address modulo 16; None for a quantised weight, which is made dense for each product."""
    return (t.stride(), t.data_ptr() % 16) if isinstance(t, Tensor) else None


def _obstacle(path: Path, problem: Problem) -> str | None:
    return path.why_not(problem.device, problem) or check.admit(path, problem)
