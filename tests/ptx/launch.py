"""Launch a kernel's PTX on torch tensors of the CPU.

    memory = Tensors()
    run(Program(parse(text)), [memory.address(x), memory.address(y), np.int32(n)], (4,), 128, memory)
    memory.fetch()

Tensors are placed with the layout of their storage. Only bytes that belong to an element may be touched: not what lies
between the rows of a view, nor past its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .hopper import TensorMap
from .machine import Machine, Program
from .memory import BASE, HOST, UNWRITTEN, WRITTEN, Global


@dataclass
class Options:
    """How to run. `late`: asynchronous work ends as late as PTX allows, or at once. `seed`: chance decides that, and
    which warp runs when. `resident`: how many thread blocks are there at a time, where they wait for each other (all).
    """

    late: bool = True
    seed: int | None = None
    wgmma_by_warp: bool = False  # a warp's wgmma.wait_group vouches for its own quarter of a product only
    resident: int | None = None
    lanes: int = 4096  # threads side by side
    steps: int = 2_000_000  # basic blocks run before it is called endless


class Tensors:
    """The memory of one launch, and the tensors in it."""

    def __init__(self) -> None:
        self.memory = Global()
        self.placed: dict[int, int] = {}  # storage -> where it lies
        self.tensors: list[tuple[torch.Tensor, int]] = []  # and where its storage lies

    def address(self, tensor: torch.Tensor, written: bool = True) -> int:
        """Where the emulated GPU finds the tensor; `written=False`: nobody may read it before the kernel writes it."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.placed:  # as far past a multiple of 256 as on the host
            self.placed[key] = self.memory.place(storage.nbytes(), key % 256)
        base = self.placed[key]
        self.tensors.append((tensor, base))
        if written:
            elements(self.memory.data[base - BASE :], tensor)[...] = elements(storage_bytes(tensor), tensor)
        elements(self.memory.state[base - BASE :], tensor)[...] = HOST if written else UNWRITTEN
        return base + tensor.storage_offset() * tensor.itemsize

    def fetch(self) -> None:
        """Copies what kernels wrote back into the tensors."""
        for tensor, base in self.tensors:
            data, state = (elements(part[base - BASE :], tensor) for part in (self.memory.data, self.memory.state))
            np.copyto(elements(storage_bytes(tensor), tensor), data, where=state >= WRITTEN)


def storage_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's whole storage, shared."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def elements(storage: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
    """What belongs to the tensor's elements in an array with one entry a byte of its storage: (*shape, itemsize)."""
    strides = [s * tensor.itemsize * storage.itemsize for s in tensor.stride()]
    return np.lib.stride_tricks.as_strided(
        storage[tensor.storage_offset() * tensor.itemsize :],
        (*tensor.shape, tensor.itemsize),
        (*strides, storage.itemsize),
    )


def tensor_map(address: int, tensor: torch.Tensor, box: Sequence[int], swizzle: int) -> TensorMap:
    """The map of a tensor as cuTensorMapEncodeTiled would make it; `box` in the tensor's own order of dimensions."""
    strides = tuple(reversed([s * tensor.itemsize for s in tensor.stride()]))
    return TensorMap(address, tensor.itemsize, tuple(reversed(tensor.shape)), strides, tuple(reversed(box)), swizzle)


def pack(program: Program, values: Sequence) -> tuple[np.ndarray, dict[int, TensorMap]]:
    """The parameter buffer of numpy scalars, addresses and tensor maps, and the maps by their place in it."""
    slots = list(program.kernel.params.values())
    if len(values) != len(slots):
        raise ValueError(f"{program.kernel.name}: {len(slots)} parameters in PTX, {len(values)} values")
    buffer, maps = np.zeros(slots[-1].offset + slots[-1].size if slots else 0, np.uint8), {}
    for slot, value in zip(slots, values, strict=True):
        if isinstance(value, TensorMap):
            maps[slot.offset] = value
            continue
        value = np.uint64(value) if isinstance(value, int) else value
        raw = np.frombuffer(
            value.tobytes() if hasattr(value, "tobytes") else bytes(value), np.uint8
        )  # or a ctypes struct
        if raw.size != slot.size:
            raise ValueError(f"{program.kernel.name}: {slot.name} has {slot.size} bytes, not {raw.size}")
        buffer[slot.offset : slot.offset + slot.size] = raw
    return buffer, maps


def run(
    program: Program, values: Sequence, grid: Sequence[int], threads: int, memory: Tensors, shared: int = 0,
    options: Options | None = None,
) -> None:  # fmt: skip
    """All thread blocks of a launch. `shared`: bytes of dynamic shared memory. Raises `Fault` at the first error."""
    options = options or Options()
    grid = (*grid, 1, 1)[:3]
    parameters, maps = pack(program, values)
    machine = Machine(program, memory.memory, parameters, maps, grid, threads, shared, options)
    blocks, batch = int(np.prod(grid)), max(1, options.lanes // threads)
    if program.together:
        batch = blocks
    for first in range(0, blocks, batch):
        machine.run(first, min(batch, blocks - first))
