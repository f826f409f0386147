"""What a GPU can hold, and how a kernel cuts its work: `Target`, `Tile`, and the tables' common ground.

A tile is chosen by a pure function of (target, shape, dtype, alignment), so the tables can be tested and compiled
offline on a machine with no GPU. Nothing here asks a device anything until `target_of` or `multiprocessors` is called.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastlora import env

KIB = 1024

# Shared memory that one program may use, in bytes. CUDA: "Technical specifications per compute capability" of the CUDA
# C++ programming guide, the limit per block. HIP: LDS per workgroup of the CDNA3 and CDNA4 ISA documents.
SHARED_LIMIT = {
    75: 64 * KIB,
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
}
REGISTER_LIMIT = 255  # per thread, every CUDA architecture above


@dataclass(frozen=True)
class Target:
    """A GPU architecture: backend "cuda" with arch 75, 80, ...; "hip" with "gfx942", ...; "interpreter" with 0."""

    backend: str
    arch: int | str

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"

    @property
    def family(self) -> Target:
        """The target whose tables serve this one: itself, or the nearest older relative with no more shared memory."""
        if self.arch in SHARED_LIMIT or self.backend == "interpreter":
            return self
        if self.backend == "hip":
            return Target("hip", "gfx942")
        arch = int(self.arch)
        for floor, known in ((120, 120), (100, 100), (90, 90), (89, 89), (88, 86), (87, 80), (86, 86), (80, 80)):
            if arch >= floor:
                return Target("cuda", known)
        return Target("cuda", 75)

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may use."""
        return 1 << 30 if self.backend == "interpreter" else SHARED_LIMIT[self.family.arch]

    @property
    def has_tma(self) -> bool:
        """Tensor memory accelerator and programmatic dependent launch: sm_90 and newer."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def has_bfloat16(self) -> bool:
        """False where bfloat16 has no matrix instruction (Turing)."""
        return self.backend != "cuda" or int(self.arch) >= 80


@dataclass(frozen=True)
class Tile:
    """How one program cuts its work, with the compiler options that belong to the cut."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    persistent: bool = False
    tma: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The launch options, as keywords of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


TARGETS = tuple(Target("hip" if isinstance(arch, str) else "cuda", arch) for arch in SHARED_LIMIT)
INTERPRETER = Target("interpreter", 0)


@functools.cache
def _target_of_index(index: int) -> Target:
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def target_of(device: torch.device) -> Target:
    """The target that kernels on `device` are compiled for; asks the device once.

    Raises:
        RuntimeError: `device` is no GPU, and Triton's interpreter is off.
    """
    if device.type == "cuda":
        return _target_of_index(torch.cuda.current_device() if device.index is None else device.index)
    if env.interpreting():
        return INTERPRETER
    raise RuntimeError(f"Triton kernels need a CUDA or ROCm device, or TRITON_INTERPRET=1; the tensor is on {device}")


@functools.cache
def _multiprocessors_of_index(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent grid on `device` should have; asks the device once (2 in the interpreter)."""
    if device.type != "cuda":
        return 2
    return _multiprocessors_of_index(torch.cuda.current_device() if device.index is None else device.index)


def padded_rank(R: int) -> int:
    """R padded to a power of two of at least 16, the smallest inner dimension of `tl.dot`."""
    return max(16, 1 << (R - 1).bit_length())


def rank_block(target: Target, dtype: torch.dtype, precision: str) -> int:
    """Columns of the rank that the GEMM multiplies at once: few, to spare registers; sm_100 accumulates elsewhere."""
    if target.arch == 75 or (dtype == torch.float32 and precision == "ieee"):  # no matrix instructions there
        return 16
    return 128 if target.backend == "cuda" and target.family.arch == 100 else 32


def input_precision(dtype: torch.dtype, target: Target) -> str:
    """INPUT_PRECISION of `tl.dot`: real float32 products unless torch's setting allows tf32 and the hardware has it."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32" if target.backend == "cuda" and int(target.arch) >= 80 else "ieee"
