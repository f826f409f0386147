"""How long each kernel of a training step takes on a GPU, and each of a kernel's tiles, beside what arithmetic expects.

    python -m benchmarks.kernels [--cases 'lorafusion-8192x4096*'] [--paths hybrid split] [--seconds 60]

Kernels are timed by the profiler, over rotating sets of inputs that no cache holds; quoted are medians. `expected` is a
path's passes by the traffic model at the ceilings that were measured in the same run. Writes
benchmarks/results/<device>/<date>-kernels.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from unittest import mock

import torch

from benchmarks import cases, contenders, measure, model
from benchmarks.cases import TRAIN, Case, Job
from benchmarks.runner import _silent, set_count
from fastlora import autograd, check
from fastlora.kernels import tiles as tables
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem

STEPS = 8
CASES = (
    Case("lorafusion", 8192, 4096, 4096, 16, "bfloat16", 0.1),
    Case("lorafusion", 8192, 4096, 4096, 16, "bfloat16", 0.0),
    Case("classifier", 960, 768, 768, 16, "bfloat16", 0.1),
    Case("classifier", 4096, 768, 768, 8, "bfloat16", 0.1),
    Case("classifier", 960, 768, 768, 16, "float32", 0.1),
    Case("classifier", 64, 100, 128, 2, "float32", 0.1),
    Case("llama3-8b-down", 2048, 14336, 4096, 16, "bfloat16", 0.1),
    Case("lorafusion", 4096, 4096, 4096, 16, "bfloat16", 0.1, projections=3),
    Case("classifier", 960, 768, 768, 16, "bfloat16", 0.1, projections=3),
)
NAMES = ("bare", "eager", *(name for name in PATHS if name != "cpu"))


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="append", help="shell pattern of the suite's cases (default: nine of them)")
    parser.add_argument("--paths", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=float, default=90.0, help="no case begins after so long (default 90)")
    parser.add_argument("--output", help="folder for the JSON (default benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m benchmarks.kernels: there is no GPU here", file=sys.stderr)
        return 2
    device, end = torch.device("cuda"), time.perf_counter() + args.seconds
    measure.warm_clocks(device)
    ceilings, rows = model.measure_ceilings(device, 2.0), []
    print(ceilings, flush=True)
    payload = {"kind": "kernels", "metadata": measure.metadata(device), "ceilings": asdict(ceilings), "rows": rows}
    asked = {job.case.name: job.case for job in cases.select(cases.gpu_jobs(), args.cases)}.values()
    for case in asked if args.cases else CASES:
        if time.perf_counter() > end:
            break
        for row in _case(case, args.paths, device, ceilings):
            rows.append(row)
            print(_line(row), flush=True)
        path = measure.write_results("kernels", payload, args.output)  # after each: an interrupted run leaves something
    print(path)
    return 0


def _case(case: Case, names: list[str], device: torch.device, ceilings: model.Ceilings):
    job, kind = Job(case, TRAIN, 0), case.torch_dtype
    sets = contenders.draw(case, set_count(job, device), device)
    problem = Problem(case.M, case.N, case.K, case.R, kind, kind, check.indexed(device), case.dropout > 0)
    seen: set[str] = set()  # kernels of which another path has had its tiles timed
    for name in names:
        row = {"case": case.name, "contender": name}
        try:
            together = case.several and name in PATHS
            made = contenders.CONTENDERS["fastlora" if together else name].calls(case, sets, False)
            passes = model.passes(case, name, TRAIN)
            row["expected"] = [one.seconds(ceilings, case.dtype) for one in passes]
            with mock.patch.dict(os.environ, {"FASTLORA_PATH": name} if together else {}):
                found = _profiled([call.train for call in made])
            yield row | {"kernels": found}
            if name in PATHS and PATHS[name].tiles and not together:
                yield from ({**row, "expected": None, **found} for found in _tiles(name, problem, case, sets, seen))
        except Exception as error:  # one contender's failure must not cost the others' results
            yield row | {"failed": f"{type(error).__name__}: {error}"[:300]}


def _tiles(name: str, problem: Problem, case: Case, sets: list, seen: set[str]):
    """Each kernel of a path with every tile that a table has for it: the time of that kernel alone."""
    for kernel, default in PATHS[name].tiles(problem).items():
        if kernel in seen:
            continue
        seen.add(kernel)
        for tile in dict.fromkeys((*default, *_more(kernel, problem))):
            path = PATHS[name].with_tiles({kernel: tile})

            def step(t, path=path):
                y = autograd.run(path, t.x, t.weight, t.lora_A, t.lora_B, t.bias, 2.0, case.dropout)
                torch.autograd.grad(y, (t.x, t.lora_A, t.lora_B), t.dy)

            row = {"kernel": kernel, "tile": str(tile)}
            try:
                yield row | {"kernels": _profiled([lambda t=t: step(t) for t in sets])}
            except Exception as error:  # nor one tile's
                yield row | {"failed": f"{type(error).__name__}: {error}"[:300]}


def _more(kernel: str, problem: Problem) -> list[tables.Tile]:
    """The tiles of other architectures and ranks that this one can hold too."""
    target = tables.target_of(problem.device)
    kind = tables.kind_of(problem.dtype, tables.input_precision(problem.dtype, target))
    if kernel.startswith("gemm"):
        rows = [tables.gemm_row(target, kind, problem.R, True, problem.dropout, tma) for tma in (True, False)]
        return [tile for row in rows for tile in row]
    rows = [row for (_, one), row in tables.RANK_TILES[kernel].items() if one == kind]
    return list(dict.fromkeys(tile for row in rows for tile in tables.flat(row)))


def _profiled(steps: list[Callable[[], object]]) -> list[tuple[str, float]]:
    """(name, median seconds) of every kernel of a step, in the order in which they run."""
    turn = itertools.cycle(steps)
    for _ in range(3):
        next(turn)()
    torch.cuda.synchronize()
    with _silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            next(turn)()
        torch.cuda.synchronize()
    events = [one for one in profile.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda one: one.time_range.start)
    count, rest = divmod(len(events), STEPS)
    if rest or not count:
        raise RuntimeError(f"{len(events)} kernels in {STEPS} steps")
    return [
        (events[i].name, statistics.median(one.time_range.elapsed_us() for one in events[i::count]) / 1e6)
        for i in range(count)
    ]


def _line(row: dict) -> str:
    what = f"{row['case']} {row['contender']}"
    if "failed" in row:
        return f"{what} {row.get('kernel', '')} {row.get('tile', '')}: FAILED {row['failed']}"
    if "tile" in row:
        own = [(n, s) for n, s in row["kernels"] if n.startswith(row["kernel"].removesuffix("_dx")) or "gemm" in n]
        return f"{what}   {row['kernel']} {row['tile']}: " + ", ".join(f"{n[:24]} {1e6 * s:.1f}" for n, s in own)
    took = sum(seconds for _, seconds in row["kernels"])
    lines = [f"{what}: {1e6 * took:.1f} us, expected {1e6 * sum(row['expected']):.1f}"]
    lines.append("   expected " + ", ".join(f"{1e6 * one:.1f}" for one in row["expected"]))
    return "\n".join([*lines, *(f"   {1e6 * seconds:8.1f}  {name[:90]}" for name, seconds in row["kernels"])])


if __name__ == "__main__":
    sys.exit(main())
