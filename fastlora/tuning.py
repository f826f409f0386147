"""Which path is the fastest on a GPU: measured once per bucket of shapes, and remembered.

A bucket is M rounded up to a power of two, with all else as it is. One JSON file in the cache folder for each device,
torch, Triton and fastlora version, read once per process, and again under the lock before anything is measured, so that
of several processes that meet a new shape one measures and the others read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path as File

import filelock
import torch
from torch import Tensor

from fastlora import autograd, check, env
from fastlora._version import __version__
from fastlora.cache import read_json, write_json
from fastlora.errors import warn_once
from fastlora.paths import ATEN, PATHS, Path
from fastlora.paths.problem import Problem

FIELDS = ("M", "N", "K", "R", "dtype", "adapter_dtype", "dropout")
LOCK_WAIT_S = 60.0  # longer than any one tuning run
ROUNDS = 11
SAMPLE_S = 1e-3

_known: dict[File, dict[tuple, str]] = {}


def bucket(problem: Problem) -> tuple:
    """What one measurement stands for."""
    M, N, K, R, dtype, adapter_dtype, _, dropout = problem
    return 1 << max(M - 1, 0).bit_length(), N, K, R, _name(dtype), _name(adapter_dtype), dropout


def fastest_path(problem: Problem, measure: Callable[[Problem], dict[str, float]] | None = None) -> str:
    """The fastest path for the bucket of `problem`, measured now if no process has done so before.

    Args:
        measure: seconds of each usable path for a problem; default `time_paths`.

    While a CUDA graph is captured nothing can be measured, and another process that measures is waited for no longer
    than LOCK_WAIT_S: then `torch`. So it is when measuring fails (no memory, say). Neither is remembered on disk.
    """
    file, key = store(problem.device), bucket(problem)
    if file not in _known:
        _known[file] = read(file)
    if key in _known[file]:
        return _known[file][key]
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return ATEN.name
    measure = measure or time_paths
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_suffix(".lock"), timeout=LOCK_WAIT_S):
            _known[file] |= read(file)
            if key not in _known[file]:
                found = _measured(measure, problem)
                if found is None:
                    return ATEN.name
                _known[file][key] = found
                write(file, _known[file], problem.device)
    except filelock.Timeout:
        return ATEN.name
    except OSError as error:
        warn_once(("autotune", file), f"fastlora: what is tuned here cannot be kept in {file.parent}: {error}")
        if key not in _known[file]:
            _known[file][key] = _measured(measure, problem) or ATEN.name
    return _known[file][key]


def time_paths(problem: Problem) -> dict[str, float]:
    """Median seconds of forward and backward for each path that can run `problem`, on random data, in turns.

    The caller's random numbers stay what they were.
    """
    device = problem.device
    steps: dict[str, Callable[[], None]] = {}
    gpus = [device] if device.type == "cuda" else []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(gpus):
        tensors = _draw(problem)
        clock = _cuda_seconds if device.type == "cuda" else _host_seconds
        calls = {}
        for path in PATHS.values():
            if path.why_not(device, problem) or check.admit(path, device):
                continue
            step = _step(path, problem, *tensors)
            try:
                step()
                calls[path.name] = max(1, min(50, int(SAMPLE_S / max(clock(step, 3), 1e-9))))
                steps[path.name] = step
            except Exception as error:  # whatever a compiler or driver raises, the path is no candidate
                warn_once(("autotune", path.name, problem), f"fastlora: {path.name!r} could not be timed: {error}")
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                samples[name].append(clock(step, calls[name]))
    return {name: sorted(values)[ROUNDS // 2] for name, values in samples.items()}


def store(device: torch.device) -> File:
    """The file that remembers what was measured on `device` with these versions."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    name = f"{device_class(device)}-torch{torch.__version__}-triton{triton}-fastlora{__version__}.json"
    return env.cache_dir() / "autotune" / name


def device_class(device: torch.device) -> str:
    """The GPU's own name in lower case and hyphens, or `cpu`."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def read(file: File) -> dict[tuple, str]:
    """Bucket to path; empty when the file is absent or damaged, which costs one more measurement."""
    try:
        rows = [(tuple(row[name] for name in FIELDS), row["path"]) for row in read_json(file)["rows"]]
        return {key: path for key, path in rows if path in PATHS}
    except (KeyError, TypeError):
        return {}


def write(file: File, known: dict[tuple, str], device: torch.device) -> None:
    """Replace the file whole."""
    rows = [dict(zip(FIELDS, key, strict=True)) | {"path": path} for key, path in known.items()]
    write_json(file, {"device": device_class(device), "versions": {"torch": torch.__version__}, "rows": rows})


def _measured(measure: Callable[[Problem], dict[str, float]], problem: Problem) -> str | None:
    try:
        seconds = measure(problem)
        return min(seconds, key=seconds.__getitem__, default=None)
    except RuntimeError as error:  # no memory for the random data, say
        warn_once(
            ("autotune", bucket(problem)),
            f"fastlora: timing the paths for {problem} failed, so path {ATEN.name!r} runs: {error}",
        )
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _draw(problem: Problem) -> tuple[Tensor, ...]:
    """x, weight, lora_A, lora_B and dy of a problem, from a generator of their own."""
    M, N, K, R, dtype, adapter_dtype, device, _ = problem
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    learning = (normal(M, K), normal(R, K, dtype=adapter_dtype), normal(N, R, dtype=adapter_dtype))
    x, lora_A, lora_B = (t.requires_grad_() for t in learning)
    return x, normal(N, K), lora_A, lora_B, normal(M, N)


def _step(path: Path, problem: Problem, x, weight, lora_A, lora_B, dy) -> Callable[[], None]:
    p = 0.1 if problem.dropout else 0.0

    def step() -> None:
        y = autograd.run(path, x, weight, lora_A, lora_B, None, 2.0, p)
        torch.autograd.grad(y, (x, lora_A, lora_B), dy)

    return step


def _cuda_seconds(step: Callable[[], None], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _host_seconds(step: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls
