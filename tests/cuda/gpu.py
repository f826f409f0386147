"""fastlora.kernels.cuda on CPU tensors: its host code as it is, a driver that hands each launch to the emulator.

    with Emulated(sms=5) as gpu:
        S = cuda.forward(...)

What runs is nvcc's PTX of csrc/cuda; `edit` breaks it first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastlora.kernels import cuda
from tests.cuda.mutants import Mutant
from tests.ptx import nvcc
from tests.ptx.hopper import TensorMap
from tests.ptx.launch import Options, Tensors, run
from tests.ptx.machine import Program
from tests.ptx.parse import parse

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
_spec = importlib.util.spec_from_file_location("cuda_build", SOURCES / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


@functools.cache
def host() -> tuple[Path, ctypes.CDLL]:
    """The library without its machine code, and the driver that it finds."""
    folder = Path(tempfile.mkdtemp(prefix="fastlora-cuda-"))
    include = f"-I{build.find_nvcc().parents[1] / 'include'}"
    (folder / "none").write_bytes(b"\0")
    build.link(folder / "_cuda.so", dict.fromkeys(build.KERNELS, folder / "none"))
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", include, "-o", folder / "driver.so", Path(__file__).parent / "driver.c"],
        check=True,
    )
    return folder / "_cuda.so", ctypes.CDLL(str(folder / "driver.so"))


@functools.cache
def text(name: str) -> str:
    """A kernel's PTX, alone in its module."""
    whole = nvcc.ptx(SOURCES / f"{name.split('_')[0]}.cu")
    head, *kernels = whole.split(".visible .entry ")
    return f"{head}.visible .entry {next(k for k in kernels if k.startswith(f'{name}('))}"


@functools.cache
def program(name: str, edit: Mutant | None) -> Program:
    return Program(parse(edit(text(name)) if edit else text(name), name))


@dataclass
class Emulated:
    """Context: `sms` multiprocessors, the emulator's `options`, and what has been launched."""

    sms: int = 5
    options: Options = field(default_factory=Options)
    edit: Mutant | None = None
    launches: list[tuple[str, int]] = field(default_factory=list)
    error: BaseException | None = None

    def __enter__(self) -> Emulated:
        library, self.driver = host()
        self.callback = LAUNCH(self._launched)
        self.driver.driver_set(self.callback, self.sms, 1)
        self.saved = cuda.LIBRARY, cuda.DRIVER, cuda._launch
        cuda.LIBRARY, cuda.DRIVER, cuda._launch = library, str(Path(self.driver._name)), self._launch
        cuda.library.cache_clear()
        return self

    def __exit__(self, *_) -> None:
        cuda.LIBRARY, cuda.DRIVER, cuda._launch = self.saved
        cuda.library.cache_clear()
        cuda._flags.clear()

    def _launch(self, name, call, reads, writes) -> None:
        self.memory = Tensors()
        for tensors, written in ((reads, True), (writes, False)):
            for fieldname, tensor in tensors.items():
                address = None if tensor is None else self.memory.address(tensor, written=written)
                setattr(call, fieldname, address)
        code = getattr(cuda.library(), f"fastlora_cuda_{name}")(ctypes.byref(call))
        if self.error:
            error, self.error = self.error, None
            raise error
        cuda._check(cuda.library(), code)
        self.memory.fetch()
        if reads["flags"].any():
            raise AssertionError(f"flags are left behind: {reads['flags'].nonzero().flatten().tolist()}")

    def _launched(self, name, grid, threads, shared, cooperative, arguments) -> int:
        try:
            edit = self.edit if self.edit and name.decode().startswith(self.edit.kernel) else None
            kernel = program(name.decode(), edit)
            values = []
            for slot, at in zip(kernel.kernel.params.values(), arguments[: len(kernel.kernel.params)], strict=True):
                raw = ctypes.string_at(at, slot.size)
                values.append(_map(raw) if slot.size == 128 and slot.align == 64 else raw)
            assert cooperative and threads == kernel.kernel.threads and grid <= self.sms
            self.launches.append((name.decode(), grid))
            run(kernel, values, (grid,), threads, self.memory, shared, self.options)
            return 0
        except BaseException as error:  # would be lost in C
            self.error = error
            return 1


def _map(raw: bytes) -> TensorMap:
    address, columns, rows, stride, wide, high, swizzle, size = (int(n) for n in np.frombuffer(raw, np.uint64)[:8])
    return TensorMap(address, size, (columns, rows), (size, stride), (wide, high), swizzle)
