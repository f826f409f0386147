"""Kernels compiled before they are called, into Triton's cache: in threads, and in processes when that takes long.

Python's lock lets one thread compile at a time. A helper process imports torch and triton anew, which takes seconds, so
there is none while the threads find all in the cache.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from fastlora.kernels import tiles
from fastlora.kernels.launch import Launch
from fastlora.kernels.tiles import Target

PATIENCE_S = 0.5  # that the threads have before there are helpers
MOST_HELPERS = 8
Calls = Sequence[tuple]  # (path's name, its tiles by kernel, problem on `meta`)


def compile_all(target: Target, launches: Sequence[Launch], calls: Calls, load: Callable[[Launch], object]) -> None:
    """`load` each of `launches`, those of `calls`; errors wait for the call itself."""
    helpers = []
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(load, one) for one in launches]
        if wait(futures, PATIENCE_S).not_done:
            count = min(MOST_HELPERS, (os.cpu_count() or 1) // 2 - 1)
            helpers = [_helper(target, calls, index, count) for index in range(count)]
        wait(futures)
    for helper in helpers:
        helper.kill()
        helper.wait()


def _helper(target: Target, calls: Calls, index: int, count: int) -> subprocess.Popen:
    """A process that compiles every count-th launch, the last first: threads begin with the first."""
    quiet, paths = subprocess.DEVNULL, {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    helper = subprocess.Popen(command, env=os.environ | paths, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    helper.stdin.write(pickle.dumps((target, tiles.tf32(), calls, index, count)))
    helper.stdin.close()
    return helper


def planned(target: Target, calls: Calls) -> list[Launch]:
    """What `calls` launch, each compiled kernel once."""
    from fastlora.paths import PATHS

    found: dict[str, Launch] = {}
    token = tiles.planned_for.set(target)
    try:
        for name, cut, problem in calls:
            path = PATHS[name].with_tiles(cut)
            found |= {one.key(target): one for one in path.launches(path, problem)}
    finally:
        tiles.planned_for.reset(token)
    return list(found.values())


def main() -> None:
    """A helper: what to do comes on standard input."""
    target, tf32, calls, index, count = pickle.load(sys.stdin.buffer)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    for launch in planned(target, calls)[::-1][index::count]:
        try:
            launch.compile(target)
        except Exception:  # whoever calls it hears of it
            continue


if __name__ == "__main__":
    main()
