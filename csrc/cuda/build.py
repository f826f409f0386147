"""Builds the CUDA C++ library: kernels to machine code for sm_90a, and a host file that holds them.

    python csrc/cuda/build.py fastlora/_cuda.so

Needs nvcc of CUDA 12 or newer (tried: 13.0, 13.5; a system's, or the wheels nvidia-cuda-nvcc, nvidia-cuda-runtime and
nvidia-cuda-cccl) and a C++ compiler; no GPU, no libcuda. Nothing but libstdc++ and libdl is linked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = ("forward", "backward")
SOURCES = sorted(HERE.glob("*.c*")) + sorted(HERE.glob("*.h"))
FLAGS = ["-std=c++17", "-arch=sm_90a", "-lineinfo"]


def find_nvcc() -> Path:
    """CUDACXX, the wheel's, the one on PATH, CUDA_HOME's. Raises FileNotFoundError where there is none."""
    wheels = (Path(p) / "nvidia" for p in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]) if p)
    candidates = [
        os.environ.get("CUDACXX"),
        *sorted((nvcc for wheel in wheels for nvcc in wheel.glob("cu*/bin/nvcc")), reverse=True),
        shutil.which("nvcc"),
        Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc",
    ]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return Path(candidate).resolve()
    raise FileNotFoundError(
        "no nvcc: install CUDA, or pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
    )


def compile_kernels(name: str, out: Path, kind: str, *extra: str) -> str:
    """Compiles `name`.cu to `kind` ("ptx" or "cubin"); what the compiler said of it."""
    command = [find_nvcc(), *FLAGS, *extra, f"-{kind}", "-o", out, HERE / f"{name}.cu"]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def link(out: Path, images: dict[str, Path]) -> None:
    """The host's file with the kernels' machine code inside."""
    defines = [f'-D{name.upper()}_CUBIN="{image}"' for name, image in images.items()]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wl,-z,noexecstack", f"-I{find_nvcc().parents[1] / 'include'}"]
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, *flags, *defines, "-o", out, HERE / "host.cpp", "-ldl"], check=True)


def library(out: Path) -> None:
    """The shared library, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        images = {name: Path(folder) / f"{name}.cubin" for name in KERNELS}
        for name, image in images.items():
            compile_kernels(name, image, "cubin")
        link(Path(folder) / out.name, images)
        os.replace(Path(folder) / out.name, out)


if __name__ == "__main__":
    library(Path(sys.argv[1]).absolute())
