"""The self-check: each path against the reference in float64, on small ragged cases, on the device itself.

What is compiled from this project runs on a device only after it has passed here. A verdict is kept in memory and, for
the device, driver, versions and the path's fingerprint, in the cache folder, so it costs a second once per machine.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from dataclasses import replace

import torch

from fastlora import accuracy, autograd, env
from fastlora._version import __version__
from fastlora.cache import read_json, write_json
from fastlora.errors import warn_once
from fastlora.paths import Path
from fastlora.paths.problem import Problem

# (M, N, K, R, dropout_p): no size a multiple of a tile, one aligned case for the TMA kernels, one of a single row
CASES = ((37, 53, 41, 3, 0.0), (130, 72, 100, 16, 0.25), (64, 128, 256, 8, 0.0), (1, 24, 40, 1, 0.0))

_verdicts: dict[tuple[str, torch.device], str | None] = {}


def admit(path: Path, device: torch.device) -> str | None:
    """Whether `path` may run on `device`: None, or why not. Checks the first time, remembers after that."""
    if not needs_check(path, device):
        return None
    device = indexed(device)
    if (path.name, device) not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "its self-check has not run yet and cannot run while a graph is captured; call fastlora.selfcheck()"
        store = _store(path, device)
        verdict = read_json(store)
        reason = verdict.get("reason", 0) if isinstance(verdict, dict) else 0
        if reason is not None and not (isinstance(reason, str) and reason.isprintable()):  # absent or damaged
            reason = examine(path, device)
            try:
                write_json(store, {"path": path.name, "reason": reason})
            except OSError as error:  # a read-only home costs a second per process, nothing else
                warn_once(
                    "self-check cache",
                    f"fastlora: the self-check's verdict could not be kept in {store.parent}: {error}",
                )
        _verdicts[path.name, device] = reason
        if reason:
            warn_once(
                ("self-check", path.name, device),
                f"fastlora: path {path.name!r} failed its self-check on {device} and is disabled there: {reason}",
            )
    return _verdicts[path.name, device]


def needs_check(path: Path, device: torch.device) -> bool:
    """ATen is trusted, and Triton's interpreter; what was compiled is not, until it was compared on this device."""
    return path.fingerprint is not None and not (device.type == "cpu" and env.interpreting())


def recheck(path: Path, device: torch.device) -> str | None:
    """Examine `path` on `device` anew: None, or why it cannot run there."""
    reason = path.why_not(device, None) or examine(path, device)
    _verdicts[path.name, indexed(device)] = reason
    return reason


def examine(path: Path, device: torch.device) -> str | None:
    """Compare `path` with the reference on `device` now, by the road of eager calls; None, or the first fault."""
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if _has_bfloat16(device) else [])
    # whatever surrounds the first call must not reach the check: its generator, no_grad, autocast, the default device,
    # hooks of saved tensors (a checkpoint's, which count what is saved)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.device("cpu"),
    ):
        cases = [(*sizes, dtype, dtype) for dtype in dtypes for sizes in CASES]
        for seed, (M, N, K, R, dropout_p, dtype, adapter_dtype) in enumerate([*cases, *path.cases]):
            problem = Problem(M, N, K, R, dtype, adapter_dtype, device, dropout_p > 0.0)
            if path.why_not(device, problem):
                continue
            inputs = accuracy.draw(M, N, K, R, dtype, adapter_dtype=adapter_dtype, device=device, seed=seed)
            kinds = "/".join(str(kind).removeprefix("torch.") for kind in dict.fromkeys((dtype, adapter_dtype)))
            case = f"M={M} N={N} K={K} R={R} {kinds} dropout={dropout_p}"
            try:
                found = _violations(path, inputs, dropout_p, seed)
            except Exception as error:  # whatever a compiler or driver raises, the path is not to be used
                return f"{case}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if found:
                return f"{case}: {found[0]}"
    return None


def _violations(path: Path, inputs: accuracy.Inputs, dropout_p: float, seed: int) -> list[str]:
    if dropout_p:
        torch.manual_seed(seed)
        mask = path.mask(autograd.draw_seed(inputs.x.device), *inputs.x.shape, dropout_p)
        inputs = replace(inputs, dropout_p=dropout_p, mask=mask)
    torch.manual_seed(seed)  # so that the call draws the same

    def function(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
        return autograd.run(path, x, weight, lora_A, lora_B, bias, scaling, dropout_p)

    return accuracy.violations(accuracy.run(function, inputs), inputs)


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def indexed(device: torch.device) -> torch.device:
    """`device` with its index, which a bare "cuda" leaves to what is current."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _store(path: Path, device: torch.device) -> pathlib.Path:
    facts = {
        "path": path.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": _driver(device),
        "torch": torch.__version__,
        "fastlora": __version__,
        "fingerprint": path.fingerprint(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return env.cache_dir() / "selfcheck" / f"{key}.json"


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    module = pathlib.Path("/proc/driver/nvidia/version")
    return f"{version() if version else ''} {module.read_text() if module.is_file() else ''}"
