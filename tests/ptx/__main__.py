"""Run the kernels' compiled code without a GPU: python -m tests.ptx [--target 80 90] [--kernel s gemm] [--count N]

A case of `cases.py` for each launch of the compile matrix, or --all. Each runs twice: with asynchronous work as late as
it may end, and with that and the warps' turns drawn by chance from the seed. Both must hold the error rule, and be
equal to the bit. A table of targets and kernels comes last; --json keeps a line for each launch, which the compile
matrix shows. Exit status 1: a case went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from fastlora.kernels import matrix
from fastlora.kernels.tiles import Target

from .cases import Case, Wrong, cases, run
from .gpu import Emulator
from .launch import Options
from .memory import Fault
from .parse import Unsupported

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "executed"
TARGETS = (75, 80, 86, 89, 90, 120)


def examine(case: Case, seed: int, orders=None) -> tuple[list[str], str, float]:
    """Labels of the launches, "ok" or what went wrong, seconds."""
    labels: dict[str, None] = {}
    started = time.perf_counter()
    torch.set_num_threads(1)
    gpu, verdict, before = Emulator(int(case.target.arch)), "ok", None
    for order in orders or ({"late": True}, {"seed": seed}):
        gpu.options = Options(**order)
        try:
            with gpu, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = run(case, lambda launch: labels.setdefault(launch.label))
            if before and not all(torch.equal(before[name], results[name]) for name in results):
                verdict = f"the bits depend on what ends when: {order}"
            before = results
        except (Fault, Wrong, Unsupported) as error:
            verdict = f"{type(error).__name__}: {error} {order}"
        except Exception:  # the compiler's: told, and on
            verdict = traceback.format_exc(limit=-2)
        if verdict != "ok":
            break
    return list(labels), verdict, time.perf_counter() - started


def labels(case: Case) -> list[str]:
    """Of the case's launches, without running them."""
    found: list[str] = []
    with mock.patch.object(JITFunction, "run", lambda *args, **keywords: None), contextlib.suppress(Wrong):
        run(case, lambda launch: found.append(launch.label))
    return found


def covering(target: Target, found: list[Case], done: set[tuple[str, str]]) -> list[Case]:
    """Of the cases found, one for each launch that the compile matrix has on `target` and `done` has not."""
    left = {launch.label for _, launch in matrix.launches([target])} - {
        label for at, label in done if at == str(target)
    }
    chosen = []
    for case in found if left else ():
        reached = left.intersection(labels(case))
        if reached:
            chosen.append(case)
            left -= reached
    if left:
        print(f"{target}: these cases do not reach {len(left)} launches of the matrix: {min(left)}, ...", flush=True)
    return chosen


def _examine(item: tuple[Case, int]):
    return examine(*item)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, nargs="+", default=TARGETS, help="compute capabilities (default: all)")
    parser.add_argument("--kernel", nargs="+", help="s, up, da, ds_db, onepass, gemm, gemm_dx, mask, s_shared, ...")
    parser.add_argument("--missing", action="store_true", help="only launches that the file of --json has not as ok")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose line has this in it")
    parser.add_argument("--all", action="store_true", help="every case, not one for each launch of the matrix")
    parser.add_argument("--count", type=int, help="so many of all cases of each target, drawn by the seed")
    parser.add_argument(
        "--seed", type=int, default=None, help="of schedules and of --count (default: drawn and printed)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / f"triton-{triton.__version__}.json",
                        help="write a line for each launch (default: where the compile matrix looks)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.missing and not args.json:
        parser.error("--missing wants --json, the file that says what is there")
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    chance = random.Random(seed)
    torch.set_num_threads(1)
    chosen: list[Case] = []
    done = {key for key, result in read(args.json).items() if result == "ok"} if args.missing else set()
    for arch in args.target:
        target = Target("cuda", arch)
        found = [c for c in cases(target) if c.kernel in (args.kernel or c.kernel) and args.only in str(c)]
        found = found if args.all or args.count else covering(target, found, done)
        chosen += chance.sample(found, min(args.count, len(found))) if args.count else found
    order = [case.dtype for case in chosen]
    chosen.sort(key=lambda case: order.index(case.dtype))  # what is broken off has seen every kernel of every target
    print(f"{len(chosen)} cases, seed {seed}", flush=True)
    rows: dict[tuple[str, str], str] = {}
    table: dict[tuple[str, str], list[float]] = {}
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork")) as pool:
        items = [(case, zlib.crc32(f"{seed} {case}".encode())) for case in chosen]
        for case, (labels, verdict, seconds) in zip(chosen, pool.map(_examine, items), strict=True):
            if verdict != "ok":
                arch = f"--target {case.target.arch} --kernel {case.kernel}"
                print(f'{verdict}\n   python -m tests.ptx --all {arch} --seed {seed} --only "{case}"', flush=True)
            for label in labels:
                if rows.get((str(case.target), label), "ok") == "ok":
                    rows[str(case.target), label] = verdict.splitlines()[0]
            entry = table.setdefault((str(case.target), case.kernel), [0, 0, 0.0])
            entry[0] += 1
            entry[1] += verdict != "ok"
            entry[2] += seconds
            if args.json and sum(e[0] for e in table.values()) % 20 == 0:
                write(args.json, rows, seed)
    print("\n| target | kernel | cases | wrong | seconds |\n| --- | --- | ---: | ---: | ---: |")
    for (target, kernel), (count, wrong, seconds) in table.items():
        print(f"| {target} | {kernel} | {count} | {wrong} | {seconds:.0f} |")
    wrong = sum(entry[1] for entry in table.values())
    print(f"{len(chosen)} cases with triton {triton.__version__}, seed {seed}: {wrong} wrong")
    if args.json:
        write(args.json, rows, seed)
    return 1 if wrong else 0


def read(file: Path) -> dict[tuple[str, str], str]:
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {(r["target"], r["label"]): r["result"] for r in rows}


def write(file: Path, rows: dict[tuple[str, str], str], seed: int) -> None:
    """The rows, with those that the file already has of other targets and launches."""
    rows = read(file) | rows
    lines = ",\n".join(json.dumps({"target": t, "label": n, "result": v}) for (t, n), v in sorted(rows.items()))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{"triton": "{triton.__version__}", "seed": {seed}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
