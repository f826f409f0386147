"""FASTLORA_AUTOTUNE=1: measure the usable paths once per bucket of shapes, and remember the fastest.

One JSON file in the cache folder for each device, torch, Triton and fastlora version, in the format of the committed
tables. It is read once per process, and again under the lock before anything is measured, so that of several processes
that meet a new shape one measures and the others read; it is replaced whole, so that no reader sees half of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from fastlora import env
from fastlora._version import __version__
from fastlora.dispatch import registry, table
from fastlora.dispatch.check import admit
from fastlora.dispatch.problem import Problem
from fastlora.errors import warn_once
from fastlora.regular_files import read_regular

FALLBACK = "torch"
FIELDS = {"M": int, "N": int, "K": int, "R": int, "dtype": str, "dropout": bool}  # of a row, as in `table.bucket`
MAX_BYTES = 8 << 20  # of the file: some 60,000 rows
LOCK_WAIT_S = 60.0  # longer than any one tuning run
ROUNDS = 11
SAMPLE_S = 1e-3

_known: dict[Path, dict[tuple, str]] = {}


def lookup(problem: Problem, measure: Callable[[Problem], dict[str, float]] | None = None) -> str:
    """The fastest path for the bucket of `problem`, measured now if no process has done so before.

    Args:
        measure: seconds of each usable path for a problem; default `time_paths`.

    While a CUDA graph is captured nothing can be measured, and another process that measures is waited for no longer
    than LOCK_WAIT_S: then `torch`, which is not remembered. When measuring fails, `torch` too, which is.
    """
    file = store(problem.device)
    key = table.bucket(problem)
    found = _read_once(file).get(key)
    if found is not None:
        return found
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return FALLBACK
    measure = measure or time_paths
    problem = problem._replace(M=key[0])
    try:
        with _lock(file) as held:
            known = _known[file] = read(file)
            if key not in known and held:
                known[key] = _measured(measure, problem)
                write(file, known, problem.device)
            return known.get(key, FALLBACK)
    except OSError as error:
        warn_once(("autotune", file), f"fastlora: what is tuned here cannot be kept in {file.parent}: {error}")
        known = _known[file]
        if key not in known:
            known[key] = _measured(measure, problem)
        return known[key]


def fastest(seconds: dict[str, float]) -> str:
    """The path with the least time; `torch` when nothing was measured."""
    return min(seconds, key=seconds.__getitem__, default=FALLBACK)


def time_paths(problem: Problem) -> dict[str, float]:
    """Median seconds of forward and backward for each path that can run `problem`, on random data, in turns.

    The caller's random numbers stay what they were.
    """
    candidates = {}
    for name in registry.NAMES:
        path = registry.load(name)
        if not (path.unavailable(problem.device) or path.unsupported(problem) or admit(name, problem.device)):
            candidates[name] = path
    gpus = [problem.device] if problem.device.type == "cuda" else []
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False), torch.random.fork_rng(gpus):
        tensors = _draw(problem)
        steps = {name: _step(path, problem, *tensors) for name, path in candidates.items()}
        clock = _cuda_seconds if problem.device.type == "cuda" else _host_seconds
        calls = {}
        for name in list(steps):
            try:
                steps[name]()
                calls[name] = max(1, min(50, int(SAMPLE_S / max(clock(steps[name], 3), 1e-9))))
            except Exception as error:  # whatever a compiler or driver raises, the path is no candidate
                del steps[name]
                warn_once(("autotune", name, problem), f"fastlora: path {name!r} could not be timed: {error}")
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                samples[name].append(clock(step, calls[name]))
    return {name: sorted(values)[ROUNDS // 2] for name, values in samples.items()}


def store(device: torch.device) -> Path:
    """The file that remembers what was measured on `device` with these versions."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    name = f"{table.device_class(device)}-torch{torch.__version__}-triton{triton}-fastlora{__version__}.json"
    return env.cache_dir() / "autotune" / name


def read(file: Path) -> dict[tuple, str]:
    """Bucket to path; empty when the file is absent or damaged, which costs one more measurement."""
    try:
        rows = json.loads(read_regular(file, MAX_BYTES))["rows"]
        found = {tuple(row[name] for name in FIELDS): row["path"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    kinds = tuple(FIELDS.values())  # a row of other types is nobody's bucket, and could not be sorted among ours
    return {key: path for key, path in found.items() if path in registry.NAMES and tuple(map(type, key)) == kinds}


def write(file: Path, known: dict[tuple, str], device: torch.device) -> None:
    """Replace the file whole."""
    rows = [dict(zip(FIELDS, key, strict=True)) | {"path": path} for key, path in sorted(known.items())]
    content = {"device": table.device_class(device), "versions": {"torch": torch.__version__}, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _measured(measure: Callable[[Problem], dict[str, float]], problem: Problem) -> str:
    try:
        return fastest(measure(problem))
    except RuntimeError as error:  # no memory for the random data, say
        warn_once(
            ("autotune", table.bucket(problem)),
            f"fastlora: tuning of {problem} failed, so path {FALLBACK!r} runs: {error}",
        )
        return FALLBACK


def _read_once(file: Path) -> dict[tuple, str]:
    if file not in _known:
        _known[file] = read(file)
    return _known[file]


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Hold the file's lock, a file beside it; yields False when another process keeps it beyond LOCK_WAIT_S."""
    try:
        import fcntl
    except ImportError:  # no such lock on Windows: two processes may both measure, and the file stays whole
        yield True
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_suffix(".lock")
    # whatever stands under that name is left as it is: a link's target is not opened, a pipe is not waited for
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        end = time.monotonic() + LOCK_WAIT_S
        held = False
        while not held:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
        yield held
    finally:
        os.close(lock)  # gives the lock back


def _draw(problem: Problem) -> tuple[Tensor, ...]:
    """x, weight, lora_A, lora_B and dy of a problem, from a generator of their own."""
    M, N, K, R, dtype, adapter_dtype, device, _ = problem
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    adapters = normal(R, K, dtype=adapter_dtype), normal(N, R, dtype=adapter_dtype)
    return normal(M, K), normal(N, K), *adapters, normal(M, N)


def _step(path, problem: Problem, x, weight, lora_A, lora_B, dy) -> Callable[[], None]:
    p = 0.1 if problem.dropout else 0.0

    def step() -> None:
        seed = path.draw(x, p) if p else None
        _, S = path.forward(x, weight, lora_A, lora_B, None, 2.0, p, seed)
        path.backward(dy, x, weight, lora_A, lora_B, S, 2.0, p, seed, True)

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
