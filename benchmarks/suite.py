"""Run jobs in order of importance inside a budget, and write what is measured as it comes."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import measure, model
from benchmarks.cases import COMPILED, Case, Job
from benchmarks.contenders import draw
from benchmarks.runner import run_job
from fastlora.cache import write_json
from fastlora.choice import select

SECONDS_PER_JOB = {"cuda": 0.7, "cpu": 2.5}  # of timing, the building of contenders not counted
SECONDS_PER_COMPILED_JOB = {"cuda": 45.0, "cpu": 60.0}  # a compiler may take it: no such job starts with less left


def run(
    jobs: list[Job],
    device: torch.device,
    budget_s: float = math.inf,
    folder: Path | None = None,
    only: list[str] | None = None,
) -> tuple[Path, dict]:
    """Measure `jobs` and return the file written and its content.

    The file is rewritten whole after every job, so that an interrupted run leaves what it has; `left_out` names the
    jobs for which `budget_s` did not suffice, `failed` those that raised, and why.
    """
    end = time.perf_counter() + budget_s
    payload = {
        "kind": "suite",
        "metadata": measure.metadata(device),
        "left_out": [job.name for job in jobs],
        "failed": {},
        "rows": [],
    }
    measure.warm_clocks(device)
    ceilings = model.measure_ceilings(device)
    payload["ceilings"] = asdict(ceilings)
    payload["choosing_s"] = choosing_seconds(device)
    path = measure.write_results("", payload, folder)
    each = SECONDS_PER_JOB[device.type]
    longest = each
    for job in jobs:
        start = time.perf_counter()
        needed = SECONDS_PER_COMPILED_JOB[device.type] if COMPILED in job.modes else longest
        if start + needed > end:
            continue
        payload["left_out"].remove(job.name)
        try:
            rows = run_job(job, device, each, ceilings, only)
        except Exception as error:  # one job's failure must not cost a rented machine's other results
            payload["failed"][job.name] = f"{type(error).__name__}: {error}"[:300]
            print(f"{job.name:<62} FAILED: {payload['failed'][job.name]}", flush=True)
            rows = []
        payload["rows"] += rows
        write_json(path, payload)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if COMPILED not in job.modes:
            longest = max(each, 0.8 * longest, time.perf_counter() - start)  # the first pay for what is compiled once
        if rows:
            print(_line(job, rows), flush=True)
    return path, payload


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


def _line(job: Job, rows: list[dict]) -> str:
    """One line for a finished job: the floor, then each contender over it."""
    floor = next((row["median"] for row in rows if row["contender"] == "bare" and "median" in row), math.nan)
    parts = [f"{job.name:<62} bare {floor * 1e6:9.1f} us"]
    for row in rows:
        name = row["contender"] + ("" if row["mode"] == "plain" else "+" + row["mode"])
        if "skipped" in row:
            parts.append(f"{name} -")
        elif name != "bare" and "over_bare" in row:
            parts.append(f"{name} {row['over_bare']['median']:.2f}")
    return "  ".join(parts)
