"""The suite's cases under pytest-benchmark: `pytest benchmarks --benchmark-only`, `-k` to choose.

One benchmark for each job and contender, grouped by job. A quick spread by default; `-m ""` for all of them.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, contenders, runner
from benchmarks.measure import default_device

DEVICE = default_device()
JOBS = cases.jobs_for(DEVICE)
QUICK = {job.name for job in cases.quick(JOBS)}
PAIRS = [
    pytest.param(job, name, id=f"{job.name}-{name}", marks=() if job.name in QUICK else pytest.mark.slow)
    for job in JOBS
    for name in contenders.names(job.case, DEVICE)
]


@pytest.mark.parametrize(("job", "name"), PAIRS)
def test_layer(benchmark, job, name):
    sets = contenders.draw(job.case, runner.set_count(job, DEVICE), DEVICE)
    try:
        entry = runner.build(name, cases.PLAIN, job, sets, DEVICE)
        entry.step()
    except (contenders.Unavailable, RuntimeError) as error:
        pytest.skip(str(error))
    benchmark.group = job.name
    benchmark.extra_info |= {"case": job.case.name, "direction": job.direction, "contender": name}

    def step():
        entry.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=15, warmup_rounds=3, iterations=1)
