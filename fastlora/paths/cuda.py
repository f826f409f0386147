"""Path `cuda`: the place of the optional CUDA C++ kernels for Hopper. None is shipped yet."""

from __future__ import annotations

from fastlora.paths import aten
from fastlora.paths.path import Path

PATH = Path(
    "cuda",
    lambda device, problem: "this version ships no CUDA C++ library",
    aten.forward,
    aten.backward,
    aten.keep_mask,
    aten.s_factor,
)
