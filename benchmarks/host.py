"""What a step costs the host on a GPU: forward and backward of one small layer, dropout on, by path.

    python -m benchmarks.host [--seconds 60]      # with a CUDA build of torch and the node built for it

No GPU is needed, and none computes: torch, Triton and the node run all of their own host code on a stand-in for the
CUDA libraries (tests/campaigns/sync.py). Kernels, products and the driver cost nothing there, so these are the times
of the software above the driver alone. `linear` is the bare frozen layer with the gradient of its input. Writes
benchmarks/results/<device>/<date>-host.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import fastlora
from benchmarks.measure import device_name, metadata, summary, write_results
from fastlora import choice
from fastlora.node import NODE
from fastlora.paths import PATHS, mask
from tests.campaigns import sync

M, N, K, R, DROPOUT = 64, 256, 256, 8, 0.1
FUSED = ("torch", "hybrid", "onepass", "split")
GOALS = {"hybrid": 40, "onepass": 30}  # microseconds
CALLS = 50  # of a sample


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write the results; 2 where there is no CUDA build of torch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time spent on samples (default 60)")
    parser.add_argument("--hollow", action="store_true", help=argparse.SUPPRESS)  # this process has the stand-in
    args = parser.parse_args(argv)
    reason = sync.missing() or ("" if NODE else f"the node in C++ was not compiled for torch {torch.__version__}")
    if reason:
        print(f"python -m benchmarks.host: {reason}", file=sys.stderr)
        return sync.CANNOT_RUN
    if not args.hollow:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.host",
                "--hollow",
                "--seconds",
                str(args.seconds),
            ]
            return sync.run(command, Path(folder))
    taken = metadata("cuda") | {
        "host": device_name("cpu"),
        "computed": "no GPU computed: a stand-in for CUDA's libraries",
    }
    rows = {name: _row(samples) for name, samples in _measured(args.seconds).items()}
    print(f"{taken['host']}, {taken['computed']}; microseconds a step", f"{'':8} median   20%   80%   min", sep="\n")
    for name, row in rows.items():
        numbers = " ".join(f"{row[n]:6.1f}" for n in ("median", "p20", "p80", "least"))
        goal = GOALS.get(name)
        print(
            f"{name:8} {numbers}" + (f"   goal {goal}: {'met' if row['median'] <= goal else 'missed'}" if goal else "")
        )
    case = {"M": M, "N": N, "K": K, "R": R, "dropout_p": DROPOUT, "dtype": "bfloat16"}
    payload = {"metadata": taken, "case": case, "rows": rows}
    print(write_results("host", payload | {"unit": "microseconds a step", "goals": GOALS}))
    return 0


def _row(seconds: list[float]) -> dict[str, float]:
    micro = [1e6 * s for s in seconds]
    return {name: round(value, 2) for name, value in (summary(micro) | {"least": min(micro)}).items()}


def _measured(seconds: float) -> dict[str, list[float]]:
    """Seconds of a step, all contenders in turns."""

    def made(*shape: int, learns: bool = False) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=learns)

    x, weight, bias, dy = made(M, K, learns=True), made(N, K), made(N), made(M, N)
    lora_A, lora_B = made(R, K, learns=True), made(N, R, learns=True)
    arguments, learning = (x, weight, lora_A, lora_B, bias, 2.0, DROPOUT), (x, lora_A, lora_B)
    chosen = ["torch"]

    def linear() -> None:
        torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x,), dy)

    def eager() -> None:
        torch.autograd.grad(fastlora.reference.lora_linear(*arguments), learning, dy)

    def fused() -> None:
        torch.autograd.grad(fastlora.lora_linear(*arguments), learning, dy)

    def choose(name: str) -> None:
        if name in FUSED:
            chosen[0] = name
            choice._selected.clear()
            NODE.choose(PATHS[name], x, weight, lora_A, True)

    steps: dict[str, Callable[[], None]] = {"linear": linear, "eager": eager} | dict.fromkeys(FUSED, fused)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffler, end = list(steps), random.Random(0), time.perf_counter() + seconds
    with (
        sync.trusted(),
        mock.patch.object(mask, "_kernel_agrees", lambda device: True),  # which compares numbers too
        mock.patch.object(choice, "choose", lambda problem: choice.Choice(PATHS[chosen[0]], "")),
        _no_collection(),
    ):
        while time.perf_counter() < end or len(samples["linear"]) < 20:
            shuffler.shuffle(order)
            for name in order:
                choose(name)
                steps[name](), steps[name]()  # the first time of all they are recorded
                start = time.perf_counter()
                for _ in range(CALLS):
                    steps[name]()
                samples[name].append((time.perf_counter() - start) / CALLS)
    return {name: found[1:] for name, found in samples.items()}  # the first round compiles


@contextlib.contextmanager
def _no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
