"""The build: the CPU kernels, and one switch that must not be ignored. All else is declared in pyproject.toml."""

import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

if os.environ.get("FASTLORA_BUILD_CUDA", "0") not in ("", "0"):
    sys.exit("FASTLORA_BUILD_CUDA: this version has no CUDA C++ library to build; unset it to install the rest")


LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which has no limited API


class FreshExtension(build_ext):
    """A library of older sources must not stand in for one that does not compile."""

    def build_extension(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        sources = [*ext.sources, *ext.depends]
        if built.exists() and any(Path(source).stat().st_mtime > built.stat().st_mtime for source in sources):
            built.unlink()
        super().build_extension(ext)


class StableABIWheel(bdist_wheel):
    """One wheel for every Python from 3.10 on: the extension keeps to the limited API."""

    def get_tag(self):
        python, abi, system = super().get_tag()
        return ("cp310", "abi3", system) if LIMITED and python.startswith("cp") else (python, abi, system)


# Without a compiler or Python's headers the install goes on: the path `torch` then runs on CPUs.
cpu_kernels = Extension(
    "fastlora._cpu",
    sources=["csrc/cpu.cpp"],
    depends=["csrc/call.h", "csrc/cpu_kernels.h", "csrc/cpu_bfloat16.h"],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17"],
    py_limited_api=LIMITED,
    optional=True,
)

# Elsewhere torch does not run on GNU OpenMP, whose threads the kernels borrow.
if platform.system() == "Linux":
    setup(ext_modules=[cpu_kernels], cmdclass={"bdist_wheel": StableABIWheel, "build_ext": FreshExtension})
else:
    setup()
