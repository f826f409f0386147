"""One job: build its contenders, time them in turns, and make a row of each."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks import contenders, model
from benchmarks.cases import COMPILED, GRAPH, PLAIN, TRAIN, Job
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import interleave, ratio, summary

CACHE_BYTES = {"cuda": 192 << 20, "cpu": 64 << 20}  # several times what a last-level cache holds
MOST_SETS = {"cuda": 8, "cpu": 6}


@dataclass
class Entry:
    """A contender in one mode, ready to be timed. `divisor`: calls of the layer in one call of `step`."""

    name: str
    mode: str
    step: Callable[[], object]
    divisor: int = 1
    keep: list = field(default_factory=list)


def run_job(
    job: Job,
    device: torch.device,
    budget_s: float,
    ceilings: model.Ceilings | None = None,
    only: list[str] | None = None,
) -> list[dict]:
    """Rows of a job, one for each contender and mode; one that cannot run has the key `skipped` with the reason.

    `only` names the contenders beside the floor.
    """
    case, rows, path = job.case, [], contenders.chosen_path(job.case, device)
    sets = contenders.draw(case, set_count(job, device), device)
    entries: dict[str, Entry] = {}
    wanted = [name for name in contenders.names(case, device) if only is None or name in only or name == "bare"]
    if COMPILED in job.modes:
        torch._dynamo.reset()
    for mode in job.modes:
        for name in (name for name in wanted if mode in CONTENDERS[name].modes):
            label = name if mode == PLAIN else f"{name}+{mode}"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    entry = build(name, mode, job, sets, device)
                    entry.step()
                entries[label] = entry
            except Exception as error:  # a contender may fail in any way; the others are measured all the same
                rows.append(_identity(job, name, mode) | {"skipped": f"{type(error).__name__}: {error}"[:300]})
    samples = interleave({label: entry.step for label, entry in entries.items()}, budget_s, device=device)
    for label, entry in entries.items():
        samples[label] = [seconds / entry.divisor for seconds in samples[label]]
    costs = _costs({label: entry.step for label, entry in entries.items() if entry.mode == PLAIN}, device)
    for label, entry in entries.items():
        suffix = label[len(entry.name) :]
        row = _identity(job, entry.name, entry.mode) | summary(samples[label])
        for key, floor in (("over_bare", "bare" + suffix), ("over_eager", "eager" + suffix)):
            if floor in samples:
                row[key] = ratio(samples[label], samples[floor])
        row |= _rates(job, entry, path, row["median"], ceilings) | costs.get(label, {})
        if entry.name.startswith("fastlora"):
            row["path"] = contenders.chosen_path(case, device, captured=True) if entry.mode == GRAPH else path
        rows.append(row)
    return rows


def set_count(job: Job, device: torch.device) -> int:
    """How many sets of inputs rotate, so that together they are several times what a cache holds."""
    case = job.case
    size = model.SIZE[case.dtype] * (case.M * case.K + case.M * case.N + case.N * case.K)
    return max(2, min(MOST_SETS[device.type], math.ceil(CACHE_BYTES[device.type] / size)))


def build(name: str, mode: str, job: Job, sets: list, device: torch.device) -> Entry:
    """Contender `name` in `mode`, whose every step takes the next set of inputs."""
    made = CONTENDERS[name].calls(job.case, sets, mode == COMPILED)
    train = job.direction == TRAIN
    if mode == GRAPH:
        graph = _capture(made, train)
        return Entry(name, mode, graph.replay, len(made), [graph, made])
    turn = itertools.cycle(made)

    def step():
        if train:
            return next(turn).train()
        with torch.no_grad():
            return next(turn).forward()

    return Entry(name, mode, step, 1, [made])


def _identity(job: Job, name: str, mode: str) -> dict:
    return {"case": job.case.name, **asdict(job.case), "direction": job.direction, "contender": name, "mode": mode}


def _capture(made: list[contenders.Call], train: bool) -> torch.cuda.CUDAGraph:
    """One graph that calls the layer on every set of inputs in turn."""

    def all_of_them() -> None:
        for call in made:
            if train:
                call.train()
            else:
                with torch.no_grad():
                    call.forward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_of_them()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return graph


def _rates(job: Job, entry: Entry, path: str, seconds: float, ceilings: model.Ceilings | None) -> dict:
    """Operations and bytes per second, and what the traffic model expects of who does the work (`path` for us).

    No bytes and no prediction for a contender that the model does not know.
    """
    case, worker = job.case, path if entry.name.startswith("fastlora") else entry.name
    if entry.name == "fastlora-apart":
        worker = "apart"  # of which the model has no plan
    if entry.name.endswith("-lora"):
        case, worker = replace(case, dora=False), worker.removesuffix("-lora")
    worker = f"{worker}+{entry.mode}" if entry.mode == COMPILED else worker
    flops = model.useful_flops(job.case, job.direction, lora=entry.name != "bare")
    rates = {"tflops": flops / seconds / 1e12}
    try:
        moved = sum(one.bytes for one in model.passes(case, worker, job.direction))
    except KeyError:
        return rates
    rates |= {"model_bytes": moved, "bytes_per_s": moved / seconds}
    if ceilings is not None:
        captured = entry.mode == GRAPH
        predicted, floor = (model.predict(case, who, job.direction, ceilings, captured) for who in (worker, "bare"))
        rates["predicted"], rates["predicted_launches"] = predicted.seconds, predicted.launches
        rates["predicted_over_bare"] = predicted.seconds / floor.seconds
    return rates


def _costs(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, dict]:
    """Peak memory of one call of each above what it started from, and on CUDA the kernels it launches."""
    if device.type == "cuda":
        launches = _launches(list(steps.values()))
        peaks = [_cuda_peak(step) for step in steps.values()]
        found = [{"peak_memory_bytes": peak, "launches": n} for peak, n in zip(peaks, launches, strict=True)]
    else:
        found = [{"peak_memory_bytes": _cpu_peak(step)} for step in steps.values()]
    return dict(zip(steps, found, strict=True))


def _cuda_peak(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Callable[[], object]) -> int:
    with (
        _silent(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _launches(steps: list[Callable[[], object]]) -> list[int]:
    """Kernels, copies and fills of one call of each, from one profile in which a spinning kernel parts them."""
    with _silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in steps:
            torch.cuda._sleep(1000)
            step()
            torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return counts([event.name for event in sorted(on_device, key=lambda event: event.time_range.start)], len(steps))


def counts(names: list[str], groups: int) -> list[int | None]:
    """How many names stand in each group, each opened by a spinning kernel; None throughout if they do not fit."""
    found: list[int | None] = []
    for name in names:
        if "spin" in name:
            found.append(0)
        elif found:
            found[-1] += 1
    return found if len(found) == groups else [None] * groups


@contextlib.contextmanager
def _silent():
    """Keep off the terminal what the profiler of some builds writes to standard error at every start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
