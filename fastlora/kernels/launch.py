"""One launch of a kernel as data: production runs it, the compile matrix compiles it, a recording keeps it.

Each kernel file has functions that make Launches of tensors; tensors on torch's `meta` device do as well, for those are
shapes, strides, dtypes and an alignment without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastlora.kernels.tiles import Target, planned_for
from fastlora.record import recorded

SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_planned: ContextVar[list | None] = ContextVar("planned launches", default=None)


@dataclass(frozen=True, eq=False)
class Launch:
    """`fn[grid](**args, **options)`: `args` by name in the order of the signature, constexprs included.

    Scratch memory is an argument like any other: a tensor that an earlier launch of the same call writes.
    """

    fn: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Launch on the current stream, or in Triton's interpreter. Every launch of this package passes here."""
        planned = _planned.get()
        if planned is not None:
            planned.append(self)
            return
        kernel = self.fn[self.grid](**self.args, **self.options)
        seen = recorded.get()
        if seen is not None:
            seen.append((self, kernel))

    def key(self, target: Target) -> str:
        """Equal for two launches on `target` if Triton has one compiled kernel for both."""
        _, specialization, options = _binder(self.fn, target)[1](**self.args, **self.options)
        return f"{self.fn.__name__} {specialization} {sorted(options.items())}"

    def compile(self, target: Target):
        """The kernel that `run` would launch on `target`, compiled with no GPU."""
        gpu = _gpu(target)
        backend, bind = _binder(self.fn, target)
        bound, specialization, _ = bind(**self.args, **self.options)
        options, signature, constants, attrs = self.fn._pack_args(
            backend, self.options, bound, specialization, self.options
        )
        source = ast_source(self.fn)(self.fn, signature, constants, attrs)
        return triton.compile(source, target=gpu, options=options.__dict__)

    @property
    def turns(self) -> int:
        """How many tiles a program of a persistent grid makes, 1 in other grids."""
        columns = "N" if "y_desc" in self.args else "K" if "dx_desc" in self.args else None
        if columns is None:
            return 1
        sides = [triton.cdiv(self.args[side], self.args[f"BLOCK_{side}"]) for side in ("M", columns)]
        return triton.cdiv(sides[0] * sides[1], self.grid[0])

    @property
    def label(self) -> str:
        """What tells this launch from others of the package: "s/bf16/a:f32/r32/aligned/dropout 32x128 w4 s4".

        Kernel, dtype of its first tensor, tensors that have another, padded rank, whether tensors start and rows follow
        at multiples of 16 ("uneven": but the K loop does not end with a block), flags that are on; then the tile.
        """
        args = self.args
        tensors = {n: getattr(a, "base", a) for n, a in args.items() if n.endswith(("_ptr", "_desc"))}
        dtypes = {n.rsplit("_", 1)[0]: SHORT[t.dtype] for n, t in tensors.items() if getattr(t, "dtype", None) in SHORT}
        first = next(iter(dtypes.values()), "")  # the mask's kernel has none
        sizes = [v for n, v in args.items() if n.startswith("stride_") or n.rstrip("012") in ("N", "K")]
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors.values()) and all(
            v is None or v % 16 == 0 or v == 1 for v in sizes
        )
        words = [self.fn.__name__.removesuffix("_kernel"), *([first] * bool(first))]
        words += [f"{n}:{d}" for n, d in dtypes.items() if d != first]
        if "BLOCK_R" in args:
            words.append(f"r{args['BLOCK_R'] * args.get('RANK_STEPS', 1)}")
        words.append(("aligned" if args.get("EVEN_K", args.get("EVEN_N", True)) else "uneven") if aligned else "ragged")
        words += [n.lower() for n, v in args.items() if n.isupper() and v and type(v) is bool and n[:4] != "EVEN"]
        words += [[], ["dropout"], ["dropout"], ["dropout", "bits"]][args.get("DROPOUT", 0)]
        words += ["bank"] * (args.get("rows_ptr") is not None)
        words += ["tf32"] * (args.get("INPUT_PRECISION") == "tf32")
        tile = "x".join(str(args[f"BLOCK_{d}"]) for d in "MNK" if f"BLOCK_{d}" in args)
        return " ".join(["/".join(words), *([tile] * bool(tile)), *(f"{n[4]}{v}" for n, v in self.options.items())])


def ast_source(fn: Any) -> type[ASTSource]:
    """What Triton's compiler takes `fn` as: its own language, or Gluon."""
    if not fn.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _gpu(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, target.warp_size)


@cache
def _binder(fn: Any, target: Target) -> tuple[Any, Any]:
    """Triton's backend, and what sorts the arguments of `fn` for it."""
    backend = make_backend(_gpu(target))
    return backend, create_function_from_signature(fn.signature, fn.params, backend)


def run(launches: Iterable[Launch]) -> None:
    """Launch them in order."""
    for launch in launches:
        launch.run()


@contextmanager
def planning(target: Target) -> Iterator[list[Launch]]:
    """Collects the launches that this thread makes of tensors on the meta device, for `target`; none is run."""
    planned: list[Launch] = []
    tokens = _planned.set(planned), planned_for.set(target)
    try:
        yield planned
    finally:
        _planned.reset(tokens[0])
        planned_for.reset(tokens[1])
