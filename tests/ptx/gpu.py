"""Triton's launches, run here: `fn[grid](...)` on CPU tensors compiles for a GPU and executes the PTX.

    with Emulator(arch=80) as gpu:          # every Triton launch inside runs in the emulator
        s_kernel[(2, 1)](x, a, out, ...)

Tensors are placed in the emulator's memory with their storage's layout; only bytes that belong to an element may be
touched. After the launch they are copied back. PTX is where compiling ends: no assembler, which takes half the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as triton_compile
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastlora.kernels.launch import ast_source

from .hopper import TensorMap
from .launch import Options, Tensors, run
from .machine import Program
from .parse import parse

INTEGERS = {"i1": np.int8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "u8": np.uint8,
            "u16": np.uint16, "u32": np.uint32, "u64": np.uint64}  # fmt: skip


class Pointer:
    """A tensor as Triton's binder sees it: a type and an address."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Compiled:
    program: Program
    binary: Any
    signature: dict[str, str]


def no_cubin(backend=None, stages=None, *_):
    """A hook of Triton's compiler: what it makes without an assembler has cache keys of its own."""
    if stages is None:
        return "no cubin", "no cubin"
    stages["cubin"] = lambda src, metadata: b""


class Emulator:
    """A GPU of compute capability `arch`; `edit`, PTX -> PTX, is applied before it is parsed."""

    def __init__(self, arch: int, edit: Callable[[str], str] = lambda text: text, **options) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.options = Options(**options)
        self.edit = edit
        self.backend = make_backend(self.target)
        self.cache: dict[Any, Compiled] = {}

    def __enter__(self) -> Emulator:
        emulator = self
        self._before = JITFunction.run, torch.empty, knobs.runtime.add_stages_inspection_hook

        def empty(*args, **keywords):
            tensor = emulator._before[1](*args, **keywords)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        JITFunction.run = lambda fn, *args, grid, warmup, **keywords: emulator.launch(fn, grid, args, keywords)
        torch.empty = empty  # what a kernel forgets to write stays NaN
        knobs.runtime.add_stages_inspection_hook = no_cubin
        return self

    def __exit__(self, *exc) -> None:
        JITFunction.run, torch.empty, knobs.runtime.add_stages_inspection_hook = self._before

    # Compiling

    def compile(self, fn: JITFunction, args: tuple, keywords: dict) -> tuple[Compiled, dict]:
        """The kernel as a launch with these arguments compiles it, and the arguments by name."""
        bind = create_function_from_signature(fn.signature, fn.params, self.backend)
        bound, specialization, options = bind(*args, **keywords)
        key = (fn, str(specialization), str(sorted(options.items())))
        if key not in self.cache:
            parsed, signature, constants, attrs = fn._pack_args(self.backend, keywords, bound, specialization, options)
            source = ast_source(fn)(fn, signature, constants, attrs)
            binary = triton_compile(source, target=self.target, options=parsed.__dict__)
            self.cache[key] = Compiled(Program(parse(self.edit(binary.asm["ptx"]))), binary, signature)
        return self.cache[key], bound

    # Launching

    def launch(self, fn: JITFunction, grid, args: tuple, keywords: dict) -> None:
        memory = Tensors()
        args = tuple(self._place(a, memory) for a in args)
        keywords = {name: self._place(a, memory) for name, a in keywords.items()}
        compiled, bound = self.compile(fn, args, keywords)
        grid = grid(bound) if callable(grid) else grid
        metadata = compiled.binary.metadata
        threads = compiled.program.kernel.threads or 32 * metadata.num_warps
        run(compiled.program, self._values(compiled, bound), grid, threads, memory, metadata.shared, self.options)
        memory.fetch()

    @staticmethod
    def _place(value, memory: Tensors):
        if isinstance(value, torch.Tensor):
            return Pointer(value.dtype, memory.address(value))
        if hasattr(value, "block_shape"):  # a tensor descriptor, Triton's or Gluon's
            return replace(value, base=Emulator._place(value.base, memory))
        return value

    @staticmethod
    def _values(compiled: Compiled, bound: dict) -> list:
        """The kernel's parameters, in the order and form of Triton's launcher."""
        described = iter(getattr(compiled.binary.metadata, "tensordesc_meta", None) or ())
        values: list = []
        for name, kind in compiled.signature.items():
            value = bound[name]
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                values.append(value.data_ptr())
            elif kind.startswith("tensordesc"):
                values.append(tensor_map(value, next(described)))
                values += [np.int32(n) for n in value.shape] + [np.int64(n) for n in value.strides]
            elif kind == "fp32":
                values.append(np.float32(value))
            else:
                values.append(INTEGERS[kind](value))
        return [*values, 0, 0]  # Triton's scratch memories


def tensor_map(value, meta: dict) -> TensorMap:
    """What Triton's launcher passes to cuTensorMapEncodeTiled."""
    itemsize = value.base.dtype.itemsize
    strides = [int(s) * itemsize for s in value.strides]
    return TensorMap(
        value.base.data_ptr(), itemsize, tuple(int(n) for n in reversed(value.shape)), tuple(reversed(strides)),
        tuple(reversed(meta["block_size"])), meta["swizzle"],
    )  # fmt: skip
