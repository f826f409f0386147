"""The measured tables: per device class, the fastest path for a shape. Made by `python -m benchmarks tune`, committed.

A table is a JSON file `tables/<device class>.json`: `{"device": ..., "versions": {...}, "rows": [{"M", "N", "K", "R",
"dtype", "dropout", "path"}, ...]}`. A problem takes the path of its bucket: M rounded up to a power of two, with N, K,
R, dtype and dropout as measured; what no row covers is not guessed.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import torch

from fastlora import env
from fastlora.dispatch.problem import Problem

FOLDER = Path(__file__).parent / "tables"


def device_class(device: torch.device) -> str:
    """The name that a table is filed under: the GPU's own name in lower case and hyphens, or `cpu`."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def bucket(problem: Problem) -> tuple:
    """What one measurement stands for: M rounded up to a power of two, the rest as it is."""
    rounded = 1 << max(problem.M - 1, 0).bit_length()
    dtype = str(problem.dtype).removeprefix("torch.")
    return rounded, problem.N, problem.K, problem.R, dtype, problem.dropout


def lookup(problem: Problem) -> tuple[str, str] | None:
    """The measured path for `problem` and where the measurement stands; None where there is none."""
    name = device_class(problem.device)
    path = _rows(name).get(bucket(problem))
    if path is not None:
        return path, f"table {name}"
    if env.autotune():
        from fastlora.dispatch import autotune

        return autotune.lookup(problem), "tuned here"
    return None


@cache
def _rows(name: str) -> dict[tuple, str]:
    file = FOLDER / f"{name}.json"
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text())["rows"]
    return {(r["M"], r["N"], r["K"], r["R"], r["dtype"], r["dropout"]): r["path"] for r in rows}
