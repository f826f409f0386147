"""Run every kernel and tile of fastlora: python -m checks.sweep --arch 80 90 [--kernel gemm small] [--part 0/2]

Each case runs twice, with asynchronous work finishing as late as it may and at once; both must be right, and equal to
the bit. One line a case goes to --out; the exit status is 1 when a case failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from .cases import Case, gemm_cases, run, small_cases
from .gpu import Emulator


def examine(case: Case, gpus: dict[bool, Emulator]) -> tuple[str, float]:
    started = time.perf_counter()
    try:
        results = []
        for late in (True, False):
            gpus[late].cache, gpus[late].launches = gpus[True].cache, []
            with gpus[late]:
                results.append(run(case))
        for name, value in results[0].items():
            if not torch.equal(value, results[1][name]):
                return f"{name} depends on when asynchronous work ends", time.perf_counter() - started
    except Exception as error:  # a fault, a wrong result, or what the compiler or emulator cannot do: told, and on
        if type(error).__name__ not in ("Fault", "Wrong", "Unsupported"):
            traceback.print_exc()
        return f"{type(error).__name__}: {error}", time.perf_counter() - started
    return "ok", time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kernel", nargs="+", default=["gemm", "small"])
    parser.add_argument("--part", default="0/1", help="this process's share, i/n")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    share, parts = (int(n) for n in args.part.split("/"))
    out = args.out.open("a") if args.out else sys.stdout
    failed = total = 0
    for arch in args.arch:
        gpus = {late: Emulator(arch, late=late) for late in (True, False)}
        cases = [c for name in args.kernel for c in (gemm_cases if name == "gemm" else small_cases)(arch)]
        for case in cases[share::parts]:
            verdict, seconds = examine(case, gpus)
            spent = sum(launch.seconds for launch in gpus[False].launches)
            compiled = len(gpus[True].cache)
            print(f"{verdict}\t{case}\t{seconds:.2f}\t{spent:.2f}\t{compiled}", file=out, flush=True)
            total += 1
            failed += verdict != "ok"
            gpus[True].cache.clear()
    print(f"{total - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
