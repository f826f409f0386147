"""The self-check: each path against the reference in float64, on small ragged cases, on the device itself.

A Triton path runs on a GPU, and the compiled kernels on a CPU, only after they have passed here. The verdict is kept in
memory and, per device, driver, torch, Triton, fastlora version and kernel source, in the cache folder, so that the
check costs a second once per machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from fastlora import accuracy, env
from fastlora._version import __version__
from fastlora.dispatch import registry
from fastlora.dispatch.problem import Problem
from fastlora.errors import warn_once
from fastlora.regular_files import read_regular

MAX_VERDICT_BYTES = 1 << 16
# (M, N, K, R, dropout_p): no size a multiple of a tile, one aligned case for the TMA kernels, one of a single row
CASES = ((37, 53, 41, 3, 0.0), (130, 72, 100, 16, 0.25), (64, 128, 256, 8, 0.0), (1, 24, 40, 1, 0.0))

_verdicts: dict[tuple[str, torch.device], str | None] = {}


def selfcheck(device: torch.device | str | None = None) -> dict[str, str]:
    """Run every path against the reference on `device` (default: the GPU if there is one).

    Returns: per path `"ok"`, or the reason why it cannot run there or what it got wrong.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results = {}
    for name in registry.NAMES:
        reason = registry.load(name).unavailable(device) or examine(name, device)
        _verdicts[name, _indexed(device)] = reason
        results[name] = reason or "ok"
    registry.selected.clear()
    return results


def admit(name: str, device: torch.device) -> str | None:
    """Whether path `name` may run on `device`: None, or why not. Checks the first time, remembers after that."""
    if not needs_check(name, device):
        return None
    key = (name, _indexed(device))
    if key not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "its self-check has not run yet and cannot run while a graph is captured; call fastlora.selfcheck()"
        store = _store(name, device)
        verdict = _read(store)
        if verdict is None:
            verdict = {"path": name, "reason": examine(name, device)}
            _write(store, verdict)
        _verdicts[key] = verdict["reason"]
        if verdict["reason"]:
            warn_once(
                ("self-check", key),
                f"fastlora: path {name!r} failed its self-check on {device} and is disabled there: {verdict['reason']}",
            )
    return _verdicts[key]


def needs_check(name: str, device: torch.device) -> bool:
    """ATen is trusted, and Triton's interpreter; a kernel of ours is not, until it has been compared on this device."""
    return name == "cpu" or (name != "torch" and device.type != "cpu")


def examine(name: str, device: torch.device) -> str | None:
    """Compare path `name` with the reference on `device` now; None when every case is right, else the first fault."""
    path = registry.load(name)
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if _has_bfloat16(device) else [])
    # whatever surrounds the first call must not reach the check: its generator, no_grad, autocast, the default device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.device("cpu"),
    ):
        cases = [(*sizes, dtype, dtype) for dtype in dtypes for sizes in CASES]
        for seed, (M, N, K, R, dropout_p, dtype, adapter_dtype) in enumerate([*cases, *getattr(path, "CASES", ())]):
            problem = Problem(M, N, K, R, dtype, adapter_dtype, device, dropout_p > 0.0)
            if path.unsupported(problem):
                continue
            inputs = accuracy.draw(M, N, K, R, dtype, adapter_dtype=adapter_dtype, device=device, seed=seed)
            kinds = "/".join(str(kind).removeprefix("torch.") for kind in dict.fromkeys((dtype, adapter_dtype)))
            case = f"M={M} N={N} K={K} R={R} {kinds} dropout={dropout_p}"
            try:
                found = _violations(path, inputs, dropout_p)
            except Exception as error:  # whatever a compiler or driver raises, the path is not to be used
                return f"{case}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if found:
                return f"{case}: {found[0]}"
    return None


def _violations(path, inputs: accuracy.Inputs, dropout_p: float) -> list[str]:
    M, K = inputs.x.shape
    seed = path.draw(inputs.x, dropout_p) if dropout_p else None
    if dropout_p:
        inputs = replace(inputs, dropout_p=dropout_p, mask=path.mask(seed, M, K, dropout_p))
    y, S = path.forward(
        inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, inputs.scaling, dropout_p, seed
    )
    dx, dA, dB = path.backward(
        inputs.dy,
        inputs.x,
        inputs.weight,
        inputs.lora_A,
        inputs.lora_B,
        S,
        inputs.scaling,
        dropout_p,
        seed,
        True,
    )
    dA, dB = dA.to(inputs.lora_A.dtype), dB.to(inputs.lora_B.dtype)  # as autograd hands them on
    return accuracy.violations({"Y": y, "dX": dx, "dA": dA, "dB": dB}, inputs)


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for source in sorted([*package.glob("kernels/*.py"), *package.glob("dispatch/*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _store(name: str, device: torch.device) -> Path:
    facts = {
        "path": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "compiled": registry.load(name).compiled() if name == "cpu" else None,
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if name in ("onepass", "split") else None,
        "fastlora": __version__,
        "source": _source_digest(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return env.cache_dir() / "selfcheck" / f"{key}.json"


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    module = Path("/proc/driver/nvidia/version")
    return f"{version() if version else ''} {module.read_text() if module.is_file() else ''}"


def _read(store: Path) -> dict | None:
    try:
        verdict = json.loads(read_regular(store, MAX_VERDICT_BYTES))
        reason = verdict["reason"]
        return verdict if reason is None or (isinstance(reason, str) and reason.isprintable()) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # absent or damaged: check again


def _write(store: Path, verdict: dict) -> None:
    temporary = None
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=store.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(verdict, file)
        os.replace(temporary, store)
    except OSError as error:  # a read-only home costs a second per process, nothing else
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warn_once(
            "self-check cache",
            f"fastlora: the self-check's verdict could not be kept in {store.parent}: {error}",
        )
