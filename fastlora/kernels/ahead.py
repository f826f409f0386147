"""Kernels compiled before they are called, into Triton's cache: in threads, and in processes when that takes long.

Python's lock lets one thread compile at a time. A helper process imports torch and triton anew, which takes seconds, so
there is none while the threads find all in the cache. It goes when its standard input is closed, after the kernel that
it is at: a compiler that is killed leaves files behind.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict

import torch

from fastlora.kernels import tiles
from fastlora.kernels.launch import Launch
from fastlora.kernels.tiles import Target, Tile
from fastlora.paths.problem import Layout, Problem

PATIENCE_S = 0.5  # that the threads have before there are helpers
MOST_HELPERS = 8
Call = tuple[str, dict[str, Tile], Problem]  # a path's name, its tiles by kernel, what it is called for


def helpers() -> int:
    """How many helpers there would be: none on few cores, nor where this program is not Python's own."""
    if not sys.executable or getattr(sys, "frozen", False):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_HELPERS, cores // 2 - 1))


def compile_all(
    target: Target, launches: Sequence[Launch], calls: Sequence[Call], load: Callable[[Launch], object]
) -> None:
    """`load` each of `launches`, those of `calls`; errors wait for the call itself."""
    started: list[subprocess.Popen] = []
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(load, one) for one in launches]
        if wait(futures, PATIENCE_S).not_done:
            count = helpers()
            with suppress(OSError):  # the threads do it all, then
                for index in range(count):
                    started.append(_helper(target, calls, index, count))
    for helper in started:
        with suppress(OSError):
            helper.stdin.close()
        threading.Thread(target=helper.wait, daemon=True).start()


def _helper(target: Target, calls: Sequence[Call], index: int, count: int) -> subprocess.Popen:
    """A process that compiles every count-th launch, the last first: threads begin with the first."""
    quiet, paths = subprocess.DEVNULL, {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    helper = subprocess.Popen(command, env=os.environ | paths, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    rows = [(name, {k: asdict(tile) for k, tile in cut.items()}, _told(problem)) for name, cut, problem in calls]
    helper.stdin.write(json.dumps([asdict(target), tiles.tf32(), rows, index, count]).encode() + b"\n")
    helper.stdin.flush()
    return helper


def _told(problem: Problem) -> list:
    return [str(part).removeprefix("torch.") if isinstance(part, torch.dtype) else part
            for part in problem._replace(device="meta")]  # fmt: skip


def _heard(parts: list) -> Problem:
    problem = Problem(*parts)
    layout = problem.layout and Layout(*(tuple(p) if isinstance(p, list) else p for p in problem.layout))
    dtypes = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    return problem._replace(dtype=dtypes[0], adapter_dtype=dtypes[1], device=torch.device("meta"), layout=layout)


def planned(target: Target, calls: Sequence[Call]) -> list[Launch]:
    """What `calls` launch on `target`, each compiled kernel once."""
    from fastlora.paths import PATHS

    found: dict[str, Launch] = {}
    token = tiles.planned_for.set(target)
    try:
        for name, cut, problem in calls:
            path, problem = PATHS[name].with_tiles(cut), problem._replace(device=torch.device("meta"))
            found |= {one.key(target): one for one in path.launches(path, problem)}
    finally:
        tiles.planned_for.reset(token)
    return list(found.values())


def main() -> None:
    """A helper: what to do is the first line of its standard input."""
    target, tf32, rows, index, count = json.loads(sys.stdin.buffer.readline())
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    calls = [(name, {k: Tile(**tile) for k, tile in cut.items()}, _heard(parts)) for name, cut, parts in rows]
    target = Target(**target)
    for launch in planned(target, calls)[::-1][index::count]:
        if select.select([sys.stdin], [], [], 0)[0]:  # its end: nobody waits for the rest
            break
        with suppress(Exception):  # whoever calls it hears of it
            launch.compile(target)


if __name__ == "__main__":
    main()
