"""Random calls of `lora_linear`, `FusedLoRALinear` and patched PEFT layers, each held against the reference.

    python -m tests.campaigns.numbers --count 100000 --seed 1         the CPU's paths
    python -m tests.campaigns.numbers --interpreter --count 5000      the Triton paths, in Triton's interpreter
    python -m tests.campaigns.numbers --case "Case(lead=(0,), K=3)"   one call again

A case that fails is shrunk, and printed as the last of these lines.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from .bases import vary
from .case import KERNELS, Case, draw, simpler
from .observe import faults, near


def campaign(
    count: int, seconds: float, seed: int, paths: tuple[str | None, ...] = (None, "torch"), say: Callable = print,
    most: int = 20, current: TextIO | None = None,
) -> tuple[int, list[Case], Counter]:  # fmt: skip
    """Run random cases until `count` or `seconds` are spent: (cases run, the shrunk failures, cases per mode).

    `current` holds the case that runs.
    """
    rng = random.Random(seed)
    ran, failed, modes = 0, [], Counter()
    end = time.monotonic() + seconds
    while ran < count and time.monotonic() < end and len(failed) < most:
        case = vary(draw(rng, paths), rng, bool(set(KERNELS) & set(paths)))
        ran += 1
        if ran % 5000 == 0:
            print(f"{ran} calls", file=sys.stderr, flush=True)
        modes[f"{case.face} {case.mode}"] += 1
        modes.update([f"over {case.base}"] * bool(case.base) + ["with DoRA"] * case.dora)
        if current is not None:
            current.seek(0)
            current.truncate()
            current.write(str(case))
            current.flush()
        if faults(case):
            small = shrink(case)
            failed.append(small)
            say(f'{faults(small)[0]}\n    python -m tests.campaigns.numbers --case "{small}"')
    return ran, failed, modes


def shrink(case: Case, fails: Callable[[Case], object] = faults, tries: int = 400, seconds: float = 30.0) -> Case:
    """A simplest case near `case` that still fails, as far as it is found in time."""
    end = time.monotonic() + seconds
    while tries > 0:
        for candidate in simpler(case):
            tries -= 1
            if fails(candidate):
                case = candidate
                break
            if tries <= 0 or time.monotonic() > end:
                return case
        else:
            return case
    return case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.numbers", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--interpreter", action="store_true", help="the Triton paths instead of the CPU's")
    parser.add_argument("--case", help="run this one case and say what is wrong with it")
    parser.add_argument("--most", type=int, default=20, help="stop after so many failures")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error(f"--count is {args.count}; it needs to be at least 1")
    kernels = args.interpreter or any(f"path='{name}'" in (args.case or "") for name in KERNELS)
    if kernels and os.environ.get("TRITON_INTERPRET") != "1":  # it must be set before Triton is imported
        command = [sys.executable, "-m", "tests.campaigns.numbers", *arguments]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    if kernels:
        from ..interpreter import patch_once

        patch_once()
    torch.set_num_threads(1)
    if args.case:
        found = faults(eval(args.case, {"Case": Case}))
        print("\n".join(found) or "right")
        return bool(found)
    with tempfile.NamedTemporaryFile("w") as current:
        child = os.fork()  # so that a crash, at the end of guarded memory say, is told with its case
        if child == 0:
            os._exit(_random_calls(args, current))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            case = Path(current.name).read_text()
            print(f'seed {args.seed}: died by signal {-status}\n    python -m tests.campaigns.numbers --case "{case}"')
        return int(status != 0)


def _random_calls(args: argparse.Namespace, current: TextIO) -> int:
    began = time.monotonic()
    paths = KERNELS if args.interpreter else (None, "torch")
    near.clear()
    ran, failed, modes = campaign(args.count, args.seconds, args.seed, paths, most=args.most, current=current)
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(modes.items()))
    seconds = time.monotonic() - began
    counts = f"{ran} calls, {len(failed)} wrong, {len(near)} in the last place"
    print(f"seed {args.seed}: {counts}, {seconds:.0f} s ({kinds})", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
