"""Which path and tiles are the fastest on a GPU: measured once per bucket of shapes, and remembered.

A bucket is M rounded up to a power of two, with all else as it is. It has two winners: by wall-clock time, for calls
that the host launches one by one, and by the GPU's time alone, for calls that a graph replays. One JSON file in the
cache folder for each device, torch, Triton and fastlora version, read once per process, and again under the lock before
anything is measured, so that of several processes that meet a new shape one measures and the others read.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import astuple
from importlib import metadata
from math import inf
from pathlib import Path as File
from statistics import median
from typing import NamedTuple

import filelock
import torch

from fastlora import autograd, check, env, roofline
from fastlora._version import __version__
from fastlora.cache import read_json, write_json
from fastlora.errors import warn_once
from fastlora.kernels.tiles import Tile
from fastlora.node import NODE
from fastlora.paths import PATHS, Path
from fastlora.paths.problem import Problem, drawn, drawn_bank

FIELDS = ("M", "N", "K", "R", "dtype", "adapter_dtype", "dropout", "layout", "tf32", "bank")
LOCK_WAIT_S = 120.0  # longer than any one tuning run
ROUNDS = 7
SAMPLE_S = 5e-3  # several calls even of a large layer: a wait for the GPU costs tens of microseconds
MOST_CALLS = 50  # of a sample: their launches must fit the driver's queue
MOST_TILES = 3  # of a kernel
HOPELESS = 2.0  # a path that by arithmetic takes so many times the best one's is not timed
LEAST_S = 2e-5  # of an expectation: below, launches decide
CLOSE = 1.25  # a path within so much of the best has its other tiles timed
CLOCK_HZ = 2e9  # at most, of a GPU that is kept busy while the host runs ahead


class Timing(NamedTuple):
    """Seconds of forward and backward by `path`: plain, one call after the other; and the GPU's own, as replayed."""

    path: Path
    plain: float
    captured: float


class Row(NamedTuple):
    """What was measured for one bucket, `torch` always among it; `failed`: not all could be, so it is not for disk."""

    timings: tuple[Timing, ...]
    failed: bool = False

    def winner(self, captured: bool) -> Path:
        return min(self.timings, key=lambda one: one.captured if captured else one.plain).path

    def __str__(self) -> str:
        lines = [f"{one.plain * 1e6:9.1f} {one.captured * 1e6:9.1f}  {one.path.label}" for one in self.timings]
        return "\n".join(["µs, plain  captured  forward and backward, measured", *lines])


_SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_known: dict[File, dict[tuple, Row]] = {}
_loaded: set[tuple[str, Problem]] = set()


def bucket(problem: Problem) -> tuple:
    """What one measurement stands for."""
    M, N, K, R, dtype, adapter_dtype, _, dropout, layout, tf32, bank = problem
    names = _name(dtype), _name(adapter_dtype)
    return 1 << max(M - 1, 0).bit_length(), N, K, R, *names, dropout, repr(layout), tf32, bank


def known(problem: Problem) -> Row | None:
    """What was measured for the bucket of `problem`, by this process or another before it began to look."""
    file = store(problem.device)
    if file not in _known:
        _known[file] = read(file)
    return _known[file].get(bucket(problem))


def tables(device: torch.device) -> list[tuple[str, str]]:
    """What was measured on `device`, by any process: each bucket in words, and its table."""
    found = read(store(device)).items()
    return [(", ".join(f"{n} {value}" for n, value in zip(FIELDS, key, strict=True)), str(row)) for key, row in found]


def measured(problem: Problem, measure: Callable[[Problem], Row] | None = None) -> Row | None:
    """What `measure` (default: `time_paths`) finds for the bucket of `problem`, now if no process has done so before.

    None when it fails (no memory, say), or another process measures for longer than LOCK_WAIT_S; neither is remembered.
    """
    if known(problem):
        return known(problem)
    file, key = store(problem.device), bucket(problem)
    lock = filelock.FileLock(file.with_suffix(".lock"), timeout=LOCK_WAIT_S)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            _known[file] = read(file) | _known[file]
            row = _known[file].get(key) or _measure(measure or time_paths, problem)
            if row and not row.failed:
                write(file, _known[file], problem.device)
        return row
    except filelock.Timeout:
        return None
    except OSError as error:
        warn_once(("autotune", file), f"fastlora: what is tuned here cannot be kept in {file.parent}: {error}")
        return _known[file].get(key) or _measure(measure or time_paths, problem)


def _measure(measure: Callable[[Problem], Row], problem: Problem) -> Row | None:
    try:
        return _known[store(problem.device)].setdefault(bucket(problem), measure(problem))
    except RuntimeError as error:  # no memory for the random data, say
        message = f"fastlora: timing the paths for {problem} failed, so path 'torch' runs: {error}"
        warn_once(("autotune", bucket(problem)), message)
        return None


def time_paths(problem: Problem) -> Row:
    """Time each path that can run `problem`, then the other tiles of those that are close to the best, on random data.

    What is timed is compiled, in threads and processes, and admitted by the self-check first. The caller's random
    numbers stay what they were.

    Raises:
        RuntimeError: nothing could be timed (no memory, say).
    """
    device = problem.device
    usable = [path for path in PATHS.values() if not path.why_not(device, problem)]
    paths = [pin(path, problem) for path in _hopeful(usable, problem)]
    what = f"{problem.M}×{problem.N}×{problem.K} {_SHORT.get(problem.dtype, problem.dtype)} r{problem.R}"
    what += " dropout" * problem.dropout + " of several adapters" * bool(problem.bank)
    line = f"fastlora: timing {len(paths)} paths for {what}, once per machine"
    print(line, file=sys.stderr, flush=True)
    return check.apart(device, _time, paths, problem)


def _hopeful(usable: list[Path], problem: Problem) -> list[Path]:
    """Those that by arithmetic may be the fastest, on the card of the device, and `torch`; without a GPU all."""
    if problem.device.type != "cuda":
        return usable
    expected = {p.name: max(roofline.predict(p.name, problem, True, NODE is not None), LEAST_S) for p in usable}
    most = HOPELESS * min(expected.values())
    return [path for path in usable if path.name == "torch" or expected[path.name] <= most]


def _time(paths: list[Path], problem: Problem) -> Row:
    session = _Session(problem)
    cuts = {path: _cuts(path, problem) for path in paths if path.tiles}
    variants = [path for found in cuts.values() for row in found.values() for path in row[1:]]
    check.compile_ahead(paths, problem, variants)
    timings = session.time(paths)
    least = [min((one[which] for one in timings), default=0.0) for which in (1, 2)]
    close = [one.path for one in timings if one.plain < CLOSE * least[0] or one.captured < CLOSE * least[1]]
    cuts = {path: cuts[path] for path in close if path.tiles}
    others = [path for found in cuts.values() for variants in found.values() for path in variants[1:]]
    check.compile_ahead(others, problem)
    times = {one.path.label: one.captured for one in timings + session.time(others)}
    for path, found in cuts.items():  # the best tile of each kernel by itself: the others' do not change its time
        best = {k: dict(min(variants, key=lambda p: times.get(p.label, inf)).cut)[k] for k, variants in found.items()}
        if path.with_tiles(best).label != path.label:
            timings += session.time([path.with_tiles(best)])
    if not timings:
        raise RuntimeError("none of them ran")
    return Row(tuple(timings), session.trial.failed)


def _cuts(path: Path, problem: Problem) -> dict[str, list[Path]]:
    """For each kernel: `path`, and `path` with another tile of that one kernel."""
    tiles = path.tiles(problem)
    return {kernel: [path.with_tiles({kernel: tile}) for tile in found[:MOST_TILES]] for kernel, found in tiles.items()}


def pin(path: Path, problem: Problem) -> Path:
    """`path` with its default tiles for `problem`, which all calls of the bucket then run."""
    tiles = path.tiles(problem) if path.tiles else {}
    return path.with_tiles({kernel: found[0] for kernel, found in tiles.items()})


def load(path: Path, problem: Problem) -> None:
    """Run `path` once, so that nothing of it is left to be compiled or loaded."""
    key = path.label, problem
    if key not in _loaded:
        _loaded.add(key)
        with suppress(RuntimeError):  # no memory: a capture will do without it
            check.apart(problem.device, _load, path, problem)


def _load(path: Path, problem: Problem) -> None:
    session = _Session(problem)
    for bias in (session.bias, None):  # each has a kernel of its own
        session.step(path, bias)()


class _Session:
    """One problem's random data, and what is timed on it."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.trial = problem, check.Trial(problem)
        *learning, dy = drawn(problem)
        x, self.weight, lora_A, lora_B, self.bias = learning
        self.leaves, self.dy = [t.requires_grad_() for t in (x, lora_A, lora_B)], dy

    def time(self, paths: list[Path]) -> list[Timing]:
        """Medians of samples taken in turns; of the paths and tiles that the self-check admits."""
        steps, calls, plain, captured = {}, {}, defaultdict(list), defaultdict(list)
        for path in paths:
            if check.admit(path, self.problem, self.trial):
                continue
            step = self.step(path)
            try:
                step()
                seconds = max(_plain_seconds(step, 3, self.problem.device), 1e-9)
            except Exception as error:  # whatever a driver raises, the path is no candidate
                self.trial.failed = True
                warn_once(
                    ("autotune", path.name, self.problem), f"fastlora: {path.label!r} could not be timed: {error}"
                )
                continue
            steps[path], calls[path] = step, max(1, min(MOST_CALLS, int(SAMPLE_S / seconds)))
        for _ in range(ROUNDS):
            for path, step in steps.items():
                plain[path].append(_plain_seconds(step, calls[path], self.problem.device))
                captured[path].append(_gpu_seconds(step, calls[path], plain[path][-1], self.problem.device))
        return [Timing(path, median(plain[path]), median(captured[path])) for path in steps]

    def step(self, path: Path, bias: torch.Tensor | None = None) -> Callable[[], None]:
        x, lora_A, lora_B = self.leaves
        p, bank = 0.1 if self.problem.dropout else 0.0, drawn_bank(self.problem)

        def step() -> None:
            y = autograd.run(path, x, self.weight, lora_A, lora_B, bias, 2.0 if bank is None else 1.0, p, bank)
            torch.autograd.grad(y, self.leaves, self.dy)

        return step


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


def read(file: File) -> dict[tuple, Row]:
    """Bucket to what was measured; a file or a row that is damaged costs one more measurement."""
    found, content = {}, read_json(file)
    rows = content.get("rows") if isinstance(content, dict) else None
    for row in rows if isinstance(rows, list) else ():
        with suppress(KeyError, TypeError, ValueError):
            found[tuple(row[name] for name in FIELDS)] = Row(tuple(_timing(*one) for one in row["timings"]))
    return {key: row for key, row in found.items() if row.timings}


def write(file: File, rows: Mapping[tuple, Row], device: torch.device) -> None:
    """Replace the file whole."""
    content = []
    for key, row in rows.items():
        cuts = [{kernel: astuple(tile) for kernel, tile in one.path.cut} for one in row.timings]
        timings = [(one.path.name, cut, *one[1:]) for one, cut in zip(row.timings, cuts, strict=True)]
        if not row.failed:
            content.append(dict(zip(FIELDS, key, strict=True)) | {"timings": timings})
    write_json(file, {"device": device_class(device), "versions": {"torch": torch.__version__}, "rows": content})


def _timing(name: str, cut: Mapping[str, list[int]], plain: float, captured: float) -> Timing:
    if not all(type(number) in (int, bool) for tile in cut.values() for number in tile):
        raise ValueError(f"a tile is {cut}; it needs to be of whole numbers")
    tiles = {kernel: Tile(*tile) for kernel, tile in cut.items()}
    return Timing(PATHS[name].with_tiles(tiles), float(plain), float(captured))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_seconds(step: Callable[[], None], calls: int, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return (time.perf_counter() - start) / calls


def _gpu_seconds(step: Callable[[], None], calls: int, plain: float, device: torch.device) -> float:
    """The GPU's time for a step: it is kept busy until the host has queued all of them."""
    if device.type != "cuda":
        return plain
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(CLOCK_HZ * (1.5 * calls * plain + 1e-4)))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
