"""The build: what is compiled for CPUs, and one switch that must not be ignored. All else is in pyproject.toml."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CUDA = os.environ.get("FASTLORA_BUILD_CUDA", "0") not in ("", "0")
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which has no limited API


class FreshExtension(build_ext):
    """A library of older sources must not stand in for one that does not compile."""

    def build_extension(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        sources = [*ext.sources, *ext.depends]
        if built.exists() and any(Path(source).stat().st_mtime > built.stat().st_mtime for source in sources):
            built.unlink()
        if ext.name == "fastlora._cuda":  # no Python in it: nvcc's machine code and a plain C interface
            built.parent.mkdir(parents=True, exist_ok=True)
            try:
                cuda_build().library(built.absolute())
            except (OSError, subprocess.CalledProcessError) as error:
                sys.exit(f"FASTLORA_BUILD_CUDA: {error}")
        else:
            super().build_extension(ext)

    def get_ext_filename(self, name):
        is_cuda = name.rpartition(".")[2] == "_cuda"
        return os.path.join(*name.split(".")) + ".so" if is_cuda else super().get_ext_filename(name)


class StableABIWheel(bdist_wheel):
    """One wheel for every Python from 3.10 on, where all that is compiled keeps to the limited API."""

    def get_tag(self):
        python, abi, system = super().get_tag()
        stable = all(extension.py_limited_api for extension in self.distribution.ext_modules)
        return ("cp310", "abi3", system) if stable and python.startswith("cp") else (python, abi, system)


def cuda_build():
    """csrc/cuda/build.py."""
    spec = importlib.util.spec_from_file_location("cuda_build", "csrc/cuda/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_library():
    """The CUDA C++ library, where FASTLORA_BUILD_CUDA asks for it; then a build without it is no build."""
    if not CUDA:
        return []
    sources = sorted(str(path) for path in Path("csrc/cuda").glob("*.[ch]*"))
    return [Extension("fastlora._cuda", sources=[], depends=sources, py_limited_api=LIMITED)]


def installed_torch():
    """The folder and version of the torch beside which this is installed, or (None, None).

    An isolated build cannot import it, but may compile against it.
    """
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec else Path(sysconfig.get_path("purelib")) / "torch"
    if not (folder / "include" / "torch").is_dir():
        return None, None
    found = re.search(r"^__version__ = ['\"](.+)['\"]", (folder / "version.py").read_text(), re.MULTILINE)
    return (folder, found[1]) if found else (None, None)


def node():
    """The autograd node: for the torch that is here and no other, whose version its name bears."""
    folder, version = installed_torch()
    if folder is None:
        return []
    name = "_node_" + re.sub(r"\W", "_", version)
    include = folder / "include"
    return [
        Extension(
            f"fastlora.{name}",
            sources=["csrc/node.cpp"],
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            include_dirs=[str(include), str(include / "torch" / "csrc" / "api" / "include")],
            library_dirs=[str(folder / "lib")],
            libraries=["torch_python", "torch_cpu", "c10"],
            define_macros=[("FASTLORA_NAME", name), ("PY_SSIZE_T_CLEAN", None)],
            language="c++",
            extra_compile_args=["-O2", "-g0", "-std=c++20"],
            optional=True,
        )
    ]


# Without a compiler or Python's headers the install goes on: the path `torch` then runs on CPUs. So it does without
# `node`, whose part Python then does.
cpu_kernels = Extension(
    "fastlora._cpu",
    sources=["csrc/cpu.cpp"],
    depends=["csrc/call.h", "csrc/cpu_kernels.h", "csrc/cpu_bfloat16.h"],
    language="c++",
    extra_compile_args=["-O3", "-g0", "-std=c++17"],
    py_limited_api=LIMITED,
    optional=True,
)

# Elsewhere torch does not run on GNU OpenMP, whose threads the kernels borrow.
if platform.system() == "Linux":
    setup(
        ext_modules=[cpu_kernels, *node(), *cuda_library()],
        cmdclass={"bdist_wheel": StableABIWheel, "build_ext": FreshExtension},
    )
elif CUDA:
    sys.exit("FASTLORA_BUILD_CUDA: the CUDA C++ library is for Linux")
else:
    setup()
