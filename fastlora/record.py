"""What a path did in one call, watched and written down, for the node in C++ to do again (csrc/record.h).

`observe` runs the path once and sees two things: ATen's operations, and the launches of Triton kernels. A record is
made when all that it saw is memory taken (`empty`), views, matrix products, casts of the call's tensors, and launches
whose arguments are the call's own tensors or that memory. Anything else makes the call unrecordable, and Python goes on
serving it.

A record holds for calls of the same dtypes, sizes, strides, alignment and numbers: addresses alone are filled in.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {
    op.default if op is not torch.ops.aten.empty else op.memory_format
    for op in (
        torch.ops.aten.empty,
        torch.ops.aten.new_empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty_strided,
    )
}
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm.out,
    torch.ops.aten.addmm_.default,
}
_FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"},
    **{"u64": "Q", "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"},
}
_PTX_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
MAP_BYTES, MAP_TF32 = 128, 11  # of a CUtensorMap; CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
SMALL_MAP = 128 * 1024
ALIGNMENT = 256  # of scratch memory: no less than what torch's allocator gives to the last bit a kernel asks about
COOPERATIVE, CLUSTER, SCHEDULING, SERIALIZATION = 2, 4, 5, 6  # CUlaunchAttributeID
SPREAD = 1  # CUclusterSchedulingPolicy

recorded: ContextVar[list | None] = ContextVar("recorded launches", default=None)
kernels: set = set()  # compiled kernels of records: while one may be launched, it stays loaded


class Product(NamedTuple):
    """out (M, N) = beta * c + alpha * a @ b; no c where beta is 0, and c may be out, or one row (N,). No b: a, cast."""

    out: Tensor
    c: Tensor | None
    a: Tensor
    b: Tensor | None
    beta: float = 1.0
    alpha: float = 1.0


class Unrecordable(Exception):
    """What a record cannot hold; the message says which."""


@contextmanager
def recording() -> Iterator[list]:
    """Collects (Launch, compiled kernel as Triton returned it) of every launch of this thread, in order."""
    seen: list = []
    token = recorded.set(seen)
    try:
        yield seen
    finally:
        recorded.reset(token)


class _Watch(TorchDispatchMode):
    """ATen's operations, in order with the launches that `launches` receives."""

    def __init__(self, launches: list) -> None:
        super().__init__()
        self.launches, self.taken, self.obstacle = launches, [], None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for which torch would load its compiler, a second's work; no compiler sees `observe`

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function in _EMPTY:
            self.taken.append(found)
        elif function in _PRODUCTS and not (kwargs or {}).keys() - {"beta", "alpha", "out"}:
            if "out" not in (kwargs or {}) and function is not torch.ops.aten.addmm_.default:
                self.taken.append(found)
            factors = {name: float(value) for name, value in (kwargs or {}).items() if name != "out"}
            c = args[0] if len(args) == 3 and factors.get("beta", 1.0) else None
            self.launches.append(Product(found, c, *args[-2:], **factors))
        elif function is torch.ops.aten._to_copy.default and set(kwargs or {}) == {"dtype"}:
            self.taken.append(found)
            self.launches.append(Product(found, None, args[0], None))
        elif not function.is_view:
            self.obstacle = self.obstacle or f"{function} is no part of a record"
        return found


def observe(
    call: Callable[[], tuple[Tensor | None, ...]], inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> tuple[tuple[Tensor | None, ...], tuple | None, str | None]:
    """(what `call` returns, the record or None, why there is none).

    Args:
        call: returns tensors, fresh ones.
        inputs: all tensors that it reads, in the order of the node's slots.
        wanted: which of what it returns a record has to give back.
    """
    with recording() as launches, _Watch(launches) as watch:
        outputs = call()
    if watch.obstacle or not launches:
        return outputs, None, watch.obstacle or "no launch was seen"
    try:
        slots = _Slots(inputs, [t for t, want in zip(outputs, wanted, strict=True) if want], watch.taken)
        steps = tuple(_product(slots, s) if isinstance(s, Product) else launch_step(slots, *s) for s in launches)
    except (Unrecordable, AttributeError, KeyError, ImportError) as obstacle:  # the rest: another Triton than we know
        return outputs, None, f"{type(obstacle).__name__}: {obstacle}"
    kernels.update(kernel for step in launches if not isinstance(step, Product) for kernel in step[1:])
    return outputs, (slots.outputs, slots.workspace, steps), None


class _Slots:
    """Where a tensor of the call lies: an input, an output, or an offset in the workspace."""

    def __init__(self, inputs, outputs, taken) -> None:
        self._inputs = inputs
        self._places: dict[int, int | None] = {}  # address -> slot; None: of several, so none can be told
        for slot, t in enumerate((*inputs, *outputs)):
            if t is not None:
                address = t.data_ptr()
                self._places[address] = None if address in self._places else slot
        self.count, self.workspace, self._scratch = len(inputs) + len(outputs), 0, {}
        fresh = {t.untyped_storage().data_ptr() for t in taken}
        packed = []
        for t in outputs:
            dense = t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous())
            if t.data_ptr() not in fresh or not dense or t.dim() > 5:
                raise Unrecordable("a result is no fresh, dense tensor")
            rest = (0,) * (5 - t.dim())
            packed.append(struct.pack("12q", self.like(t.dtype), t.dim(), *t.shape, *rest, *t.stride(), *rest))
        self.outputs = b"".join(packed)
        for t in taken:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._places and storage.data_ptr() not in self._scratch and storage.nbytes():
                self._scratch[storage.data_ptr()] = self.workspace
                self.workspace += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT

    def like(self, dtype: torch.dtype) -> int:
        """An input of this dtype."""
        for slot, t in enumerate(self._inputs):
            if t is not None and t.dtype is dtype:
                return slot
        raise Unrecordable(f"no input is {dtype}")

    def of(self, t: Tensor) -> tuple[int, int]:
        """(slot, offset in bytes)"""
        slot = self._places.get(t.data_ptr())
        if slot is not None:
            return slot, 0
        storage = t.untyped_storage().data_ptr()
        if t.data_ptr() in self._places or storage not in self._scratch:
            raise Unrecordable(
                f"a tensor of shape {tuple(t.shape)} is none of the call's, or one of several at its place"
            )
        return self.count, self._scratch[storage] + t.data_ptr() - storage


def _product(slots: _Slots, product: Product) -> bytes:
    packed = b""
    for t in product[:4]:
        if t is None:
            packed += bytes(7 * 8)
            continue
        cast = product.b is None and t is product.a and slots.of(t)[0] < slots.count
        if (t.dtype is not product.out.dtype and not cast) or t.dim() > 2:
            raise Unrecordable("a product of several dtypes, or of more than matrices")
        rest = (0,) * (2 - t.dim())
        packed += struct.pack("7q", *slots.of(t), t.dim(), *t.shape, *rest, *t.stride(), *rest)
    return packed + struct.pack("qdd", slots.like(product.out.dtype), product.beta, product.alpha)


def launch_step(slots: _Slots, launch: Any, kernel: Any) -> tuple:
    """One launch as csrc/record.h reads it, from what Triton compiled: the counterpart of Triton's own launcher."""
    meta = kernel.metadata
    if meta.global_scratch_size or getattr(meta, "profile_scratch_size", 0) or meta.num_ctas == 16:
        raise Unrecordable("a kernel with scratch memory of Triton's own, or clusters of 16")
    parameters = _Parameters(slots)
    descriptors = iter(getattr(meta, "tensordesc_meta", None) or ())
    for (name, kind), argument in zip(kernel.src.signature.items(), launch.args.values(), strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            parameters.descriptor(argument, next(descriptors, None))
        elif kind.startswith("*"):
            parameters.pointer(argument)
        elif kind in _FORMATS:
            parameters.number(_FORMATS[kind], argument)
        else:
            raise Unrecordable(f"argument {name} of type {kind}")
    parameters.number("q", 0)  # the two kinds of Triton's scratch memory
    parameters.number("q", 0)
    if parameters.sizes != sizes_in_ptx(kernel):
        raise Unrecordable(f"{kernel.name} takes other parameters than its signature tells")
    attributes = [
        *([_attribute(SERIALIZATION, 1)] if getattr(meta, "launch_pdl", False) else ()),
        *([_attribute(COOPERATIVE, 1)] if meta.launch_cooperative_grid else ()),
        *([_attribute(CLUSTER, meta.num_ctas, 1, 1), _attribute(SCHEDULING, SPREAD)] if meta.num_ctas > 1 else ()),
    ]
    x, y, z = (*launch.grid, 1, 1)[:3]
    grid, threads = (x * meta.num_ctas, y, z), meta.num_warps * meta.target.warp_size
    return (kernel.function, grid, threads, meta.shared, b"".join(attributes), *parameters.packed())


def _attribute(which: int, *values: int) -> bytes:
    return struct.pack("I4x64s", which, struct.pack(f"{len(values)}I", *values))


def sizes_in_ptx(kernel: Any) -> list[int]:
    """Bytes of each parameter of the kernel, as its PTX declares them."""
    entry = kernel.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    found = re.findall(
        r"\.param(?:\s+\.align\s+\d+)?\s+\.[a-z](\d+)(?:\s+\.ptr[^,\n]*?)?\s+\w+_param_\d+(?:\[(\d+)\])?", entry
    )
    return [_PTX_BYTES[bits] * int(count or 1) for bits, count in found]


class _Parameters:
    """The parameters of one launch, packed beside each other."""

    def __init__(self, slots: _Slots) -> None:
        self._slots, self._bytes, self.sizes = slots, bytearray(), []
        self._places, self._pointers, self._maps = [], [], []

    def _place(self, value: bytes, alignment: int) -> int:
        self._bytes.extend(bytes(-len(self._bytes) % alignment))
        self._places.append(len(self._bytes))
        self._bytes.extend(value)
        self.sizes.append(len(value))
        return self._places[-1]

    def number(self, kind: str, value: float) -> None:
        self._place(struct.pack("=" + kind, value), 8)

    def pointer(self, t: Tensor | None) -> None:
        place = self._place(bytes(8), 8)
        if t is not None:
            self._pointers.append((place, *self._slots.of(t)))

    def descriptor(self, descriptor: Any, meta: dict | None) -> None:
        """A tensor map, and the sizes and strides that go with it."""
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        if meta is None or meta.get("fp4_padded") or meta.get("is_im2col"):
            raise Unrecordable("a tensor descriptor of a kind that the kernels do not use")
        shape, strides, itemsize = list(descriptor.shape), list(descriptor.strides), meta["elem_size"]
        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        if getattr(descriptor, "round_f32_to_tf32", False):
            kind = MAP_TF32
        in_bytes = [itemsize * s for s in strides[-2::-1]]
        in_bytes.append(shape[0] * (in_bytes[-1] if in_bytes else itemsize))
        last = sum((n - 1) * s for n, s in zip(shape[::-1], (itemsize, *in_bytes), strict=False))
        small = (last + 2**31) % 2**32 - 2**31 + 1 < SMALL_MAP  # in 32 bits, as Triton counts
        map_ = (kind, len(shape), meta["swizzle"], descriptor.padding == "nan", small)
        five = [(*row, *(0,) * (5 - len(row))) for row in (shape[::-1], in_bytes, meta["block_size"][::-1])]
        place = self._place(bytes(MAP_BYTES), 64)
        self._maps.append((place, *self._slots.of(descriptor.base), *map_, *five[0], *five[1], *five[2]))
        for size in shape:
            self.number("i", size)
        for stride in strides:
            self.number("q", stride)

    def packed(self) -> tuple[bytes, bytes, bytes, bytes]:
        def int64s(rows):
            return b"".join(struct.pack(f"{len(row)}q", *map(int, row)) for row in rows)

        return bytes(self._bytes), int64s([self._places]), int64s(self._pointers), int64s(self._maps)
