"""CUDA C++ to PTX by the nvcc of the extra `[cuda]`, or one on the PATH."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path


def compiler() -> str | None:
    """nvcc's path; None where there is none, or no compiler of C++ for it to ask."""
    if not shutil.which("g++"):
        return None
    spec = importlib.util.find_spec("nvidia")
    found = [
        p for folder in (spec.submodule_search_locations or () if spec else ()) for p in Path(folder).glob("*/bin/nvcc")
    ]
    return str(found[0]) if found else shutil.which("nvcc")


@functools.cache
def ptx(source: str | Path, arch: str = "sm_90a", *options: str) -> str:
    """The PTX of a .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernel.ptx")
        command = [compiler(), "-std=c++17", "-lineinfo", f"-arch={arch}", "-ptx", *options, "-o", out, source]
        subprocess.run(command, check=True)
        return out.read_text()
