"""The paths: ways to compute one function. What a path is, and which there are.

To add a path: write its file beside these (`aten.py` is the shortest; `forward`, `backward` and `why_not` are most of
it) with one `Path` at its end; name it in `PATHS` below and in the README's table; say what it moves and computes in
`fastlora/roofline.py`. Choice, self-check, tuning, autograd, compiled calls, tests of all paths and the benchmarks then
take it from `PATHS`.
"""

from __future__ import annotations

from fastlora.paths import aten, cpu, cuda, gpu
from fastlora.paths.path import Path

PATHS: dict[str, Path] = {
    path.name: path for path in (aten.PATH, cpu.PATH, gpu.HYBRID, gpu.ONEPASS, gpu.SPLIT, cuda.PATH)
}
ATEN = aten.PATH  # what runs where no other can

__all__ = ["ATEN", "PATHS", "Path"]
