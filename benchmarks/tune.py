"""Make a device's table of paths: every usable path timed at the shapes of the suite and of the project's models."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks import cases, measure
from benchmarks.cases import TRAIN
from fastlora.dispatch import autotune, registry, table
from fastlora.dispatch.check import admit
from fastlora.dispatch.problem import Problem

PROJECT_LAYERS = (  # GPT-2's and DistilBERT's, at the tokens of their batches: (K, N, R)
    (768, 2304, 8),
    (768, 768, 8),
    (768, 3072, 8),
    (3072, 768, 8),
    (768, 768, 16),
    (768, 3072, 16),
    (3072, 768, 16),
)
PROJECT_M = (1024, 4096)


def problems(device: torch.device) -> list[Problem]:
    """One problem for each bucket of the suite and of the project's own models, the most important first."""
    found: dict[tuple, Problem] = {}

    def add(M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout: bool) -> None:
        problem = Problem(M, N, K, R, dtype, dtype, device, dropout)
        key = table.bucket(problem)
        found.setdefault(key, problem._replace(M=key[0]))

    jobs = cases.jobs_for(device)
    for job in (job for job in jobs if job.rank <= 3 and job.direction == TRAIN):
        case = job.case
        add(case.M, case.N, case.K, case.R, case.torch_dtype, case.dropout > 0)
    if device.type == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            for M in PROJECT_M:
                for K, N, R in PROJECT_LAYERS:
                    add(M, N, K, R, dtype, False)
                    add(M, N, K, R, dtype, True)
    for job in jobs:
        case = job.case
        add(case.M, case.N, case.K, case.R, case.torch_dtype, case.dropout > 0)
    return list(found.values())


def usable(device: torch.device) -> list[str]:
    """The paths that can run on `device`."""
    return [name for name in registry.NAMES if not (registry.load(name).unavailable(device) or admit(name, device))]


def measure_rows(device: torch.device, budget_s: float) -> tuple[list[dict], int]:
    """Rows of a table, with the seconds behind each, and the number of buckets for which `budget_s` did not suffice."""
    end = time.perf_counter() + budget_s
    rows, asked = [], problems(device)
    measure.warm_clocks(device)
    for index, problem in enumerate(asked):
        if time.perf_counter() > end:
            return rows, len(asked) - index
        try:
            seconds = autotune.time_paths(problem)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        key = dict(zip(autotune.FIELDS, table.bucket(problem), strict=True))
        rows.append(key | {"path": autotune.fastest(seconds), "seconds": seconds})
    return rows, 0


def main(budget_s: float, output: Path | None = None, folder: Path | None = None) -> int:
    """Measure, write the raw results, and write the table where more than one path can run.

    `output` is the table's file, by default the package's own for this device; `folder` takes the raw results.
    """
    device = measure.default_device()
    available = usable(device)
    rows, left_out = measure_rows(device, budget_s)
    raw = {
        "kind": "tune", "metadata": measure.metadata(device), "paths": available, "rows": rows, "left_out": left_out,
    }  # fmt: skip
    written = measure.write_results("tune", raw, folder)
    print(summary_table(rows))
    print(f"{len(rows)} buckets measured, {left_out} left out; raw: {written}")
    if device.type == "cpu" and output is None:
        print("a CPU's choice is a rule, not a table: hold these figures against it (fastlora/dispatch/choice.py)")
        return 0
    if len(available) < 2 and output is None:
        print(f"one path can run here ({', '.join(available)}), so there is nothing to choose and no table is written")
        return 0
    file = output or table.FOLDER / f"{table.device_class(device)}.json"
    measure.write_json(
        file,
        {
            "device": table.device_class(device), "versions": raw["metadata"]["versions"], "raw": written.name,
            "rows": [{name: row[name] for name in (*autotune.FIELDS, "path")} for row in rows],
        },
    )  # fmt: skip
    print(f"table: {file}")
    return 0


def summary_table(rows: list[dict]) -> str:
    """How often each path wins, and by how much over path `torch`."""
    lines = []
    for path in registry.NAMES:
        won = [row for row in rows if row["path"] == path]
        if won:
            gains = sorted(row["seconds"].get("torch", 0.0) / row["seconds"][path] for row in won)
            middle = gains[len(gains) // 2]
            lines.append(f"{path:<8} fastest in {len(won)} of {len(rows)} buckets, median {middle:.2f}x over torch")
    return "\n".join(lines)
