"""What is proved of csrc/cuda without a GPU, and what the compiler makes of it.

    python -m tests.cuda                 # the campaign: shapes, ranks, types, dropout, schedules; about half an hour
    python -m tests.cuda --mutants       # broken copies of both kernels, one place at a time; about half an hour
    python -m tests.cuda --report        # registers, spills, shared memory: benchmarks/results/cuda-resources/

Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cuda import cases, gpu, mutants

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda-resources"


def campaign() -> int:
    wrong = 0
    for case, options in cases.campaign():
        start = time.time()
        try:
            found = cases.violations(case, **options)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        wrong += bool(found)
        print(f"{case.name} {options or ''}: {found or 'ok'} ({time.time() - start:.1f} s)", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


def mutate() -> int:
    unnoticed = 0
    for kernel in gpu.build.KERNELS:
        for mutant in mutants.all_of(kernel, gpu.text(f"{kernel}_bf16_r16")):
            said = mutants.notice(mutant)
            unnoticed += said is None
            print(f"{kernel}, {mutant.kind}, {mutant.number}: {said or 'NOT NOTICED'}", flush=True)
    print(f"{unnoticed} not noticed")
    return int(unnoticed > 0)


def report() -> int:
    rows = []
    for name in gpu.build.KERNELS:
        with tempfile.TemporaryDirectory() as folder:
            said = gpu.build.compile_kernels(name, Path(folder) / "out", "cubin", "-Xptxas", "-v")
        if "Performance Loss" in said:
            print(said)
            return 1
        for part in said.split("Function properties for ")[1:]:
            stack, stores, loads = (int(n) for n in re.search(r"(\d+) bytes stack.* (\d+) b.* (\d+) b", part).groups())
            rows.append(
                {
                    "kernel": part.split()[0],
                    "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                    "stack_bytes": stack, "spill_store_bytes": stores, "spill_load_bytes": loads,
                }
            )  # fmt: skip
    version = subprocess.run([gpu.build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    plan = (gpu.SOURCES / "plan.h").read_text()
    few, many = (int(n) for n in re.search(r"FEW = (\d+), MANY = (\d+)", plan).groups())
    record = {
        "command": "python -m tests.cuda --report",
        "compiler": re.search(r"release ([\d.]+), V([\d.]+)", version)[2],
        "flags": gpu.build.FLAGS,
        "threads": 384,
        "registers_after_setmaxnreg": {"producer": few, "multiplying": many},
        "dynamic_shared_bytes": 227 * 1024,
        "blocks_per_multiprocessor": 1,
        "kernels": sorted(rows, key=lambda row: row["kernel"]),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"nvcc-{record['compiler']}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    spills = [row["kernel"] for row in rows if row["stack_bytes"] or row["spill_store_bytes"]]
    print(f"{out}: {len(rows)} kernels, {'none spills' if not spills else f'spills in {spills}'}")
    return int(bool(spills))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.cuda", description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mutants", dest="run", action="store_const", const=mutate, default=campaign)
    group.add_argument("--report", dest="run", action="store_const", const=report)
    sys.exit(parser.parse_args().run())
