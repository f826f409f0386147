"""What a step costs the host on a GPU: forward and backward of one small layer, dropout on, by path.

    python -m benchmarks.host [--seconds 60]      # with a CUDA build of torch and the node built for it

No GPU is needed, and none computes: torch, Triton and the node run all of their own host code on a stand-in for the
CUDA libraries (tests/campaigns/sync.py). Kernels, products and the driver cost nothing there, so these are the times
of the software above the driver alone. `linear` is the bare frozen layer with the gradient of its input; `3 calls` are
a query, a key and a value of one x, each alone, and `shared` the same three by `lora_linears`. `floor` is a path that
launches nothing: the same autograd nodes, checks, seeds and memory for what is returned, which no path can do without.
Writes benchmarks/results/<device>/<date>-host.json.
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
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import fastlora
from benchmarks.measure import device_name, metadata, ratio, summary, write_results
from fastlora import choice, node, record
from fastlora.node import NODE
from fastlora.paths import PATHS
from tests.campaigns import sync

M, N, K, R, DROPOUT = 64, 256, 256, 8, 0.1
LAUNCHING = {name: PATHS[name] for name in ("torch", "hybrid", "onepass", "split")}
FUSED = LAUNCHING | {"floor": replace(PATHS["split"])}
TOGETHER = ("hybrid", "split", "floor")  # the paths by which three projections are measured, apart and sharing x
SHARED_GOAL = 0.5  # of three calls
GOALS = {"hybrid": 40 / 25, "onepass": 30 / 25}  # 40 and 30 microseconds where the bare layer takes 25
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
    samples = _measured(args.seconds)
    rows = {name: _row(found, samples["linear"]) for name, found in samples.items()}
    for path in TOGETHER:
        rows[f"{path} shared"]["over 3 calls"] = round(
            ratio(samples[f"{path} shared"], samples[f"{path} 3 calls"])["median"], 3
        )
    print(f"{taken['host']}, {taken['computed']}; microseconds a step, and their ratio to the bare layer's")
    print(f"{'':14} median    20%    80%    min  ratio")
    for name, row in rows.items():
        numbers = " ".join(f"{row[n]:6.1f}" for n in ("median", "p20", "p80", "least"))
        goal = f"   goal {GOALS[name]}: {'met' if row['over'] <= GOALS[name] else 'missed'}" if name in GOALS else ""
        if "over 3 calls" in row:
            met = "met" if row["over 3 calls"] <= SHARED_GOAL else "missed"
            goal = f"   {row['over 3 calls']} of 3 calls, goal {SHARED_GOAL}: {met}"
        print(f"{name:14} {numbers} {row['over']:6.2f}{goal}")
    case = {"M": M, "N": N, "K": K, "R": R, "dropout_p": DROPOUT, "dtype": "bfloat16"}
    payload = {"metadata": taken, "case": case, "rows": rows}
    print(
        write_results(
            "host",
            payload | {"unit": "microseconds a step", "goals for the ratio": GOALS, "goal for sharing": SHARED_GOAL},
        )
    )
    return 0


def _row(seconds: list[float], linear: list[float]) -> dict[str, float]:
    """Microseconds, and `over`: the median of the ratio to the bare layer in the same round."""
    micro = [1e6 * s for s in seconds]
    found = summary(micro) | {"least": min(micro), "over": ratio(seconds, linear)["median"]}
    return {name: round(value, 2) for name, value in found.items()}


def _measured(seconds: float) -> dict[str, list[float]]:
    """Seconds of a step, all contenders in turns."""

    def made(*shape: int, learns: bool = False) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=learns)

    x, weight, bias, dy = made(M, K, learns=True), made(N, K), made(N), made(M, N)
    lora_A, lora_B = made(R, K, learns=True), made(N, R, learns=True)
    arguments, learning = (x, weight, lora_A, lora_B, bias, 2.0, DROPOUT), (x, lora_A, lora_B)
    qkv = [(made(N, K), made(R, K, learns=True), made(N, R, learns=True), made(N), 2.0) for _ in range(3)]
    qkv_learning, dys = (x, *(t for one in qkv for t in one[1:3])), [made(M, N) for _ in range(3)]
    chosen = ["torch"]

    def linear() -> None:
        torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x,), dy)

    def eager() -> None:
        torch.autograd.grad(fastlora.reference.lora_linear(*arguments), learning, dy)

    def fused() -> None:
        torch.autograd.grad(fastlora.lora_linear(*arguments), learning, dy)

    def three() -> None:
        ys = [fastlora.lora_linear(x, *one, DROPOUT) for one in qkv]
        torch.autograd.grad(ys, qkv_learning, dys)

    def shared() -> None:
        torch.autograd.grad(fastlora.lora_linears(x, qkv, DROPOUT), qkv_learning, dys)

    def choose(name: str) -> None:
        path = name.split()[0]
        if path in FUSED:
            chosen[0] = path
            choice._selected.clear()
            NODE.choose(FUSED[path], x, weight, lora_A, True)
            NODE.choose_shared(FUSED[path], x, qkv, DROPOUT)

    def observe(*call):
        outputs, made, obstacle = record.observe(*call)
        return outputs, made if chosen[0] in LAUNCHING else (made[0], 0, ()), obstacle

    steps: dict[str, Callable[[], None]] = {"linear": linear, "eager": eager} | dict.fromkeys(FUSED, fused)
    steps |= {f"{path} 3 calls": three for path in TOGETHER} | {f"{path} shared": shared for path in TOGETHER}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffler, end = list(steps), random.Random(0), time.perf_counter() + seconds
    with (
        sync.trusted(),
        mock.patch.object(choice, "choose", lambda problem: choice.Choice(FUSED[chosen[0]], "")),
        mock.patch.object(node, "observe", observe),
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
