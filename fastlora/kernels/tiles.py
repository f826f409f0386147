"""What a GPU can hold, and which tile a kernel cuts its work by: `Target`, `Tile`, the tables, the choice.

A tile is a pure function of (target, shape, dtype, alignment), so all of it can be tested and compiled on a machine
with no GPU; nothing here asks a device anything until `target_of` or `multiprocessors` is called. A tile stands in a
table when it compiles for its architecture without spilling registers and within shared memory, for all that its row
can be asked: `python -m fastlora.kernels.matrix` tells. The order within a row is arithmetic, where no
comment says that it was measured. `rank_tiles` and `gemm_tiles` choose: the first is the default, the others are what
fastlora/tuning.py times beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from fastlora import env

# Bytes of shared memory of one program and of a multiprocessor, threads of a multiprocessor, multiprocessors of the
# usual card. CUDA: "Technical specifications per compute capability" of the CUDA C++ programming guide. HIP: LDS per
# workgroup of the CDNA3 and CDNA4 ISA documents, threads of a compute unit.
KIB = 1024
LIMITS: dict[int | str, tuple[int, int, int, int]] = {
    75: (64 * KIB, 64 * KIB, 1024, 40),
    80: (163 * KIB, 164 * KIB, 2048, 108),
    86: (99 * KIB, 100 * KIB, 1536, 84),
    89: (99 * KIB, 100 * KIB, 1536, 128),
    90: (227 * KIB, 228 * KIB, 2048, 132),
    100: (227 * KIB, 228 * KIB, 2048, 148),
    120: (99 * KIB, 100 * KIB, 1536, 170),
    "gfx942": (64 * KIB, 64 * KIB, 2048, 304),
    "gfx950": (160 * KIB, 160 * KIB, 2048, 256),
}
RANK_WIDE = 32  # a rank above this takes several steps in the GEMM and smaller tiles in the other kernels


@dataclass(frozen=True)
class Target:
    """A GPU architecture: backend "cuda" with arch 75, 80, ...; "hip" with "gfx942", ...; "interpreter" with 0."""

    backend: str
    arch: int | str

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"

    @functools.cached_property
    def family(self) -> int | str:
        """The architecture whose tables serve this one: itself, or the nearest older with no more shared memory."""
        if self.arch in LIMITS or self.backend == "interpreter":
            return self.arch
        if self.backend == "hip":
            return "gfx942"
        for floor, known in ((120, 120), (100, 100), (90, 90), (89, 89), (88, 86), (87, 80), (86, 86), (80, 80)):
            if int(self.arch) >= floor:
                return known
        return 75

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may use."""
        return 1 << 30 if self.backend == "interpreter" else LIMITS[self.family][0]

    @property
    def multiprocessors(self) -> int:
        """Of the usual card: what cuts sums, so that a result's bits depend on the architecture alone."""
        return 2 if self.backend == "interpreter" else LIMITS[self.family][3]

    @property
    def has_tma(self) -> bool:
        """Tensor memory accelerator: sm_90 and newer."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def has_bfloat16(self) -> bool:
        """False where bfloat16 has no matrix instruction (Turing)."""
        return self.backend != "cuda" or int(self.arch) >= 80

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """How many programs with these claims a multiprocessor holds: 64 Ki registers, in eights a thread; 0 on HIP."""
        if self.backend != "cuda":
            return 0
        _, shared_all, threads, _ = LIMITS[self.family]
        reserved = 0 if self.family == 75 else KIB  # of each program, the driver's own
        by_registers = 65536 // (-(-max(registers, 1) // 8) * 8 * 32 * warps)
        return min(by_registers, shared_all // max(shared + reserved, 1), threads // (32 * warps), 32)


@dataclass(frozen=True)
class Tile:
    """How one program cuts its work (0: that side is not cut), with the compiler options that belong to the cut."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = False  # through tensor descriptors, in a persistent grid
    ws: bool = False  # by a kernel whose warps are specialised

    def __str__(self) -> str:
        sides = "x".join(str(side) for side in (self.block_m, self.block_n, self.block_k) if side)
        return f"{sides}w{self.num_warps}s{self.num_stages}" + "t" * self.tma + "ws" * self.ws

    @property
    def options(self) -> dict[str, int]:
        """The launch options, as keywords of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


planned_for: ContextVar[Target] = ContextVar("the target that launches on the meta device are planned for")
TARGETS = tuple(Target("hip" if isinstance(arch, str) else "cuda", arch) for arch in LIMITS)
INTERPRETER = Target("interpreter", 0)


@functools.cache
def _target_of_index(index: int) -> Target:
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def target_of(device: torch.device) -> Target:
    """The target that kernels on `device` are compiled for; asks the device once. On `meta`: what is planned for.

    Raises:
        RuntimeError: `device` is no GPU, and Triton's interpreter is off.
    """
    if device.type == "meta":
        return planned_for.get()
    if device.type == "cuda":
        return _target_of_index(torch.cuda.current_device() if device.index is None else device.index)
    if env.interpreting():
        return INTERPRETER
    raise RuntimeError(f"Triton kernels need a CUDA or ROCm device, or TRITON_INTERPRET=1; the tensor is on {device}")


@functools.cache
def _multiprocessors_of_index(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device, target: Target) -> int:
    """How many programs a persistent grid on `device` should have; asks a GPU once, else the usual card's."""
    if device.type != "cuda":
        return target.multiprocessors
    return _multiprocessors_of_index(torch.cuda.current_device() if device.index is None else device.index)


def tf32() -> bool:
    """Whether torch's settings allow float32 products in tf32 on a GPU."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the newer names, which the older ones cannot say
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def input_precision(dtype: torch.dtype, target: Target) -> str:
    """INPUT_PRECISION of `tl.dot`: real float32 products unless torch's setting allows tf32 and the hardware has it."""
    if dtype != torch.float32 or not tf32():
        return "ieee"
    return "tf32" if target.backend == "cuda" and int(target.arch) >= 80 else "ieee"


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The column of the tables: "half" for 16-bit types, else the precision of float32 products."""
    return precision if dtype == torch.float32 else "half"


def padded_rank(R: int) -> int:
    """R padded to a power of two of at least 16, the smallest inner dimension of `tl.dot`."""
    return max(16, 1 << (R - 1).bit_length())


def rank_block(target: Target, kind: str) -> int:
    """Columns of the rank that the GEMM multiplies at once: few, to spare registers; sm_100 accumulates elsewhere.

    Operands in tf32 pass through registers to be rounded, on sm_100 too."""
    if target.family == 75 or kind == "ieee":  # no matrix instructions there
        return 16
    return 128 if target.family == 100 and kind == "half" else 32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def split(target: Target, length: int, block: int, least: int, others: int, over: int = 2) -> tuple[int, int]:
    """(splits, length of each) so that splits * others programs fill the usual card `over` times.

    Each is a multiple of `block` and hardly shorter than `least`: a shorter one takes less time than adding it costs.
    """
    least = 64 if target.backend == "interpreter" else least  # small matrices are to be split there
    splits = max(1, min(over * target.multiprocessors // others, length // least))
    each = ceil_div(ceil_div(length, splits), block) * block
    return ceil_div(length, each), each


# The rank-R kernels. kernel -> (arch, type of product) -> tiles BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: for ranks up
# to the first of HOLDS one, or two for tuning to choose from; for ranks up to the second one. Those of (90, "half") are
# an H100's best, the others arithmetic: 128 bytes of a row or more, shared memory for two programs; for ds_db a region
# as wide as registers allow, for the partials of dS cost 8 * R / (BLOCK_N * itemsize) of dY's bytes.
BANK_RANK = 256  # of several adapters together
HOLDS = {
    "s": (32, 128), "up": (BANK_RANK,), "da": (32, 128), "onepass": (32, 128), "ds_db": (16, 32),
}  # fmt: skip
LIKE = {89: 86, 120: 86, 86: 80, 100: 90, 90: 80, "gfx950": "gfx942"}  # whose row serves one that has none of its own
RANK_TILES: dict[str, dict[tuple[int | str, str], tuple[tuple, ...]]] = {
    "s": {
        (75, "half"): ((32, 0, 64, 8, 3), (16, 0, 32, 8, 2)),
        (75, "ieee"): ((32, 0, 64, 4, 4), (32, 0, 32, 4, 3)),
        (80, "half"): ((32, 0, 128, 4, 4), (32, 0, 64, 8, 3)),
        (80, "ieee"): ((32, 0, 64, 4, 4), (32, 0, 32, 4, 2)),
        (80, "tf32"): ((32, 0, 64, 4, 4), (32, 0, 32, 4, 3)),
        (86, "half"): ((32, 0, 64, 4, 4), (32, 0, 32, 4, 3)),
        (86, "ieee"): ((32, 0, 64, 4, 3), (16, 0, 32, 4, 2)),
        (86, "tf32"): ((32, 0, 64, 4, 3), (32, 0, 32, 4, 3)),
        (90, "half"): (((16, 0, 128, 2, 5), (16, 0, 128, 4, 4)), (32, 0, 32, 8, 3)),
        (90, "ieee"): ((32, 0, 64, 8, 2), (32, 0, 64, 8, 2)),
        (90, "tf32"): ((32, 0, 64, 8, 4), (32, 0, 32, 8, 2)),
        (120, "ieee"): ((32, 0, 64, 4, 3), (16, 0, 32, 8, 2)),
        (120, "tf32"): ((32, 0, 32, 8, 3), (32, 0, 32, 8, 3)),
        ("gfx942", "half"): ((32, 0, 64, 4, 4), (32, 0, 32, 4, 2)),
        ("gfx942", "ieee"): ((32, 0, 32, 4, 3), (32, 0, 32, 4, 2)),
    },
    "da": {
        (75, "half"): ((32, 0, 64, 4, 3), (16, 0, 32, 4, 2)),
        (75, "ieee"): ((32, 0, 64, 4, 3), (16, 0, 32, 4, 2)),
        (80, "half"): ((64, 0, 128, 4, 4), (64, 0, 64, 8, 4)),
        (80, "ieee"): ((32, 0, 64, 4, 3), (16, 0, 32, 4, 3)),
        (80, "tf32"): ((64, 0, 64, 4, 3), (32, 0, 64, 4, 3)),
        (86, "half"): ((64, 0, 64, 4, 4), (32, 0, 64, 8, 3)),
        (86, "ieee"): ((32, 0, 64, 4, 3), (16, 0, 32, 4, 2)),
        (86, "tf32"): ((32, 0, 64, 4, 3), (32, 0, 32, 4, 3)),
        (90, "half"): (((64, 0, 64, 4, 4), (64, 0, 128, 4, 4)), (64, 0, 64, 8, 4)),
        (90, "ieee"): ((32, 0, 64, 4, 3), (16, 0, 32, 4, 2)),
        (90, "tf32"): ((64, 0, 64, 4, 4), (32, 0, 64, 4, 3)),
        (120, "half"): ((64, 0, 64, 4, 4), (32, 0, 64, 4, 3)),
        ("gfx942", "half"): ((64, 0, 128, 4, 4), (32, 0, 64, 4, 3)),
        ("gfx942", "ieee"): ((32, 0, 64, 4, 3), (32, 0, 32, 4, 2)),
    },
    "up": {
        (75, "half"): ((32, 32, 0, 4, 1),),
        (75, "ieee"): ((16, 64, 0, 4, 1),),
        (80, "half"): ((64, 64, 0, 4, 1),),
        (80, "ieee"): ((16, 64, 0, 4, 1),),
        (80, "tf32"): ((32, 64, 0, 4, 1),),
        ("gfx942", "half"): ((64, 64, 0, 4, 1),),
        ("gfx942", "ieee"): ((16, 64, 0, 4, 1),),
    },
    "ds_db": {
        (75, "half"): ((32, 64, 0, 8, 2), (32, 64, 0, 8, 2)),
        (75, "ieee"): ((32, 64, 0, 8, 2), (32, 64, 0, 8, 2)),
        (80, "half"): ((64, 256, 0, 4, 3), (32, 256, 0, 4, 2)),
        (80, "ieee"): ((32, 64, 0, 8, 2), (32, 64, 0, 8, 2)),
        (80, "tf32"): ((32, 256, 0, 8, 3), (64, 128, 0, 8, 3)),
        (86, "ieee"): ((32, 64, 0, 8, 2), (32, 64, 0, 8, 2)),
        (86, "tf32"): ((32, 256, 0, 8, 2), (32, 64, 0, 4, 2)),
        (90, "half"): (((64, 256, 0, 4, 3), (64, 128, 0, 4, 3)), (64, 256, 0, 8, 3)),
        (90, "ieee"): ((32, 64, 0, 8, 2), (32, 64, 0, 8, 2)),
        (100, "half"): ((32, 512, 0, 8, 3), (64, 256, 0, 8, 3)),
        ("gfx942", "half"): ((32, 256, 0, 8, 2), (32, 128, 0, 8, 2)),
        ("gfx942", "ieee"): ((32, 64, 0, 8, 2), (32, 64, 0, 8, 2)),
    },
    "onepass": {
        (75, "half"): ((32, 32, 16, 8, 2), (16, 16, 16, 8, 2)),
        (75, "ieee"): ((32, 32, 16, 8, 2), (16, 16, 16, 8, 2)),
        (80, "half"): ((32, 64, 64, 8, 3), (32, 32, 32, 4, 3)),
        (80, "ieee"): ((32, 64, 32, 8, 3), (16, 32, 16, 8, 2)),
        (80, "tf32"): ((32, 32, 32, 4, 3), (32, 32, 32, 4, 3)),
        (86, "half"): ((32, 64, 64, 8, 3), (32, 64, 32, 8, 3)),
        (86, "ieee"): ((32, 32, 16, 8, 3), (16, 32, 16, 8, 2)),
        (86, "tf32"): ((32, 32, 32, 4, 3), (32, 32, 16, 8, 2)),
        (90, "half"): ((32, 64, 64, 8, 3), (32, 64, 32, 8, 3)),
        (90, "ieee"): ((32, 32, 16, 8, 3), (32, 32, 16, 8, 2)),
        (90, "tf32"): ((32, 32, 32, 4, 3), (32, 32, 16, 8, 2)),
        (120, "half"): ((32, 64, 64, 8, 3), (32, 64, 32, 4, 3)),
        (120, "ieee"): ((32, 32, 16, 8, 2), (32, 32, 16, 8, 2)),
        (100, "ieee"): ((16, 32, 16, 8, 2), (16, 32, 16, 8, 2)),
        ("gfx942", "half"): ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
        ("gfx942", "ieee"): ((32, 64, 32, 4, 2), (32, 32, 32, 4, 2)),
    },
}
# Ranks above those of HOLDS, which a bank has: by the type of product, or by (arch, type) where one tile does not
# serve all; None where every tile that was tried spills.
BANK_TILES: dict[str, dict[str | tuple[int | str, str], tuple[int, ...] | None]] = {
    "s": {
        "half": (32, 0, 32, 8, 3), "tf32": (32, 0, 32, 8, 2), "ieee": (16, 0, 32, 8, 2),
        (75, "half"): None, (75, "ieee"): (16, 0, 16, 8, 2),
    },
    "da": {
        "half": (32, 0, 32, 8, 3), "tf32": (32, 0, 32, 8, 2), "ieee": (16, 0, 16, 8, 2),
        (75, "half"): (16, 0, 16, 8, 2), (120, "half"): (16, 0, 16, 8, 2),
    },
    "onepass": {"half": (32, 32, 32, 8, 2), "tf32": (16, 32, 16, 8, 2), "ieee": (16, 16, 16, 8, 2), (75, "half"): None},
}  # fmt: skip
INTERPRETER_RANK = Tile(32, 64, 64, 4, 1)


@functools.cache
def rank_tiles(kernel: str, target: Target, R: int, kind: str, bank: bool = False) -> tuple[Tile, ...]:
    """At most three tiles of a kernel of RANK_TILES, the default first; () where no tile holds that rank."""
    limits, wide = HOLDS[kernel], BANK_TILES.get(kernel, {})
    if target.backend == "interpreter":
        return (INTERPRETER_RANK,) if limits[-1] >= R or (wide and R <= BANK_RANK) else ()
    spills = kind == "ieee" or (kernel == "onepass" and kind == "tf32")  # with a threshold for each row
    if limits[-1] < R or (bank and wide and spills):
        keys = (target.family, kind), (LIKE.get(target.family), kind), kind
        cut = next((wide[key] for key in keys if key in wide), None) if R <= BANK_RANK else None
        return (Tile(*cut),) if cut else ()
    table, arch = RANK_TILES[kernel], target.family
    while (arch, kind) not in table:
        arch = LIKE[arch]
    return flat(row for row, limit in zip(table[arch, kind], limits, strict=True) if limit >= R)


def flat(row: Iterable[tuple]) -> tuple[Tile, ...]:
    """The tiles of a row of RANK_TILES, each once."""
    cuts = [cut for part in row for cut in (part if isinstance(part[0], tuple) else (part,))]
    return tuple(Tile(*cut) for cut in dict.fromkeys(cuts))


def split_k(target: Target, M: int, K: int, tile: Tile) -> tuple[int, int]:
    """How many programs of `s_kernel` share K, and the columns of each."""
    return split(target, K, tile.block_k, 512, ceil_div(M, tile.block_m))


def split_m(target: Target, M: int, K: int, tile: Tile) -> tuple[int, int]:
    """How many programs of `da_kernel` share M, and the rows of each."""
    return split(target, M, tile.block_m, 128, ceil_div(K, tile.block_k))


def regions(target: Target, M: int, tile: Tile, parts_n: int) -> tuple[int, int]:
    """How many regions of rows `ds_db_kernel` walks, and the rows of each: once over, for each costs a partial dB."""
    return split(target, M, tile.block_m, 128, parts_n, 1)


@functools.lru_cache(maxsize=1024)
def ds_db_tile(target: Target, M: int, N: int, R: int, kind: str, itemsize: int) -> Tile | None:
    """The default tile of `ds_db_kernel`; None where its partials would move more bytes than dY read again."""
    for tile in rank_tiles("ds_db", target, R, kind):
        parts_n = ceil_div(N, tile.block_n)
        parts_m, _ = regions(target, M, tile, parts_n)
        partials = 8 * R * (parts_n * M * (parts_n > 1) + parts_m * N * (parts_m > 1))
        if partials <= M * N * itemsize or target.backend == "interpreter":
            return tile
    return None


# The GEMM. Rows: "tma" and "tma dropout" through descriptors, "aligned" and "ragged" through pointers; then the type of
# float32 products; " wide" for a rank above RANK_WIDE, where that needs other tiles.
def _cut(*cuts: tuple[int, int, int, int, int], tma: bool = False) -> tuple[Tile, ...]:
    return tuple(Tile(*cut, tma=tma) for cut in cuts)


_COMMON = {
    "aligned": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (32, 64, 64, 4, 3)),
    "ragged": _cut((64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
    "aligned tf32": _cut((64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
    "ragged tf32": _cut((64, 64, 32, 8, 2), (32, 32, 32, 4, 2)),
    "aligned ieee": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
    "ragged ieee": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
}
_CDNA = {
    "aligned": _cut((128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 64, 64, 4, 2)),
    "aligned wide": _cut((64, 64, 64, 4, 2), (32, 64, 64, 4, 2)),
    "ragged": _cut((64, 64, 32, 4, 2)),
    "aligned ieee": _cut((64, 64, 32, 4, 2)),
    "ragged ieee": _cut((32, 64, 32, 4, 2)),
}
GEMM_TILES: dict[int | str, dict[str, tuple[Tile, ...]]] = {
    75: {  # no matrix instructions for these kernels: all products in registers
        "aligned": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
        "ragged": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
        "aligned ieee": _cut((16, 32, 16, 8, 1)),
        "ragged ieee": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
    },
    80: _COMMON
    | {
        "aligned": _cut((128, 256, 32, 8, 3), (128, 128, 32, 4, 4), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "aligned wide": _cut((128, 128, 64, 8, 4), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "ragged": _cut((128, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
        "aligned tf32": _cut((128, 128, 32, 8, 3), (64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
        "aligned tf32 wide": _cut((64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
        "ragged tf32": _cut((32, 32, 32, 4, 2)),
        "ragged ieee": _cut((32, 64, 16, 4, 1)),
    },
    86: _COMMON | {"ragged tf32 wide": _cut((32, 32, 32, 4, 2))},
    89: _COMMON | {"ragged tf32 wide": _cut((32, 32, 32, 4, 2))},
    90: _COMMON
    | {
        "tma": _cut((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), tma=True),
        "aligned": _cut((128, 256, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "aligned wide": _cut((128, 128, 64, 8, 4), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "ragged": _cut((128, 128, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
        "aligned tf32": _cut((128, 128, 32, 8, 3), (64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
        "ragged tf32": _cut((128, 64, 32, 8, 3), (64, 64, 32, 8, 3), (32, 32, 32, 4, 2)),
        "aligned ieee": _cut((32, 64, 16, 4, 1)),
    },
    100: _COMMON
    | {
        "tma": _cut((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), tma=True),
        "tma wide": _cut((128, 128, 64, 8, 4), tma=True),
        "tma dropout": _cut((128, 256, 64, 8, 3), (64, 64, 64, 4, 4), tma=True),
        "tma dropout wide": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 4), tma=True),
        "aligned": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (32, 64, 64, 4, 3)),
        "aligned wide": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
    },
    120: _COMMON
    | {
        "aligned wide": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
        "ragged tf32": _cut((64, 64, 16, 8, 2), (32, 32, 32, 4, 2)),
        "aligned ieee": _cut((32, 32, 16, 4, 1)),
    },
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}
WARP_SPECIALISED = Tile(128, 256, 64, 8, 4, tma=True, ws=True)  # all that fits on sm_90
INTERPRETER_GEMM = Tile(32, 32, 32, num_warps=4, num_stages=1, group_m=2)
INTERPRETER_TMA = Tile(32, 32, 32, num_warps=4, num_stages=1, group_m=2, tma=True)


@functools.cache
def gemm_row(target: Target, kind: str, R: int, aligned: bool, dropout: bool, tma: bool) -> tuple[Tile, ...]:
    """The tiles of a table's row, large ones first. With `tma` () where the architecture or the case has none."""
    if target.backend == "interpreter":
        return (INTERPRETER_TMA if tma else INTERPRETER_GEMM,)
    table = GEMM_TILES[target.family]
    row = "aligned" if aligned else "ragged"
    if tma:
        # through descriptors a wide dropped update on rows not aligned would spill
        if kind != "half" or (dropout and not aligned and R > RANK_WIDE):
            return ()
        row = "tma dropout" if dropout and "tma dropout" in table else "tma"
    elif kind != "half":
        row += f" {kind}"
    tiles = table.get(f"{row} wide" if R > RANK_WIDE else row, table.get(row, ()))
    if not tma:
        return tiles
    return tuple(replace(t, num_stages=min(t.num_stages, stages_that_fit(target, t, R, dropout))) for t in tiles)


def stages_that_fit(target: Target, tile: Tile, R: int, dropout: bool) -> int:
    """Of the pipeline of `gemm_tma_kernel` beside a quarter of Y and one step of S and U, whole or by quarters."""
    block_m, block_n, itemsize = tile.block_m, tile.block_n, 2
    block_r = min(padded_rank(R), rank_block(target, "half"))
    rest = block_m * block_n // 4 + (block_m + (block_n // 4 if dropout else block_n)) * block_r
    barriers = 1024  # some bytes each, and where the buffers begin
    return (target.shared_limit - barriers - rest * itemsize) // ((block_m + block_n) * tile.block_k * itemsize)


@functools.lru_cache(maxsize=4096)
def gemm_tiles(
    target: Target, M: int, N: int, R: int, kind: str, aligned: bool, dropout: bool, tma: bool, count: int
) -> tuple[Tile, ...]:
    """At most three tiles for Y (M, N) = X W + S U of rank R on `count` multiprocessors, the default first.

    `aligned`: every row starts at a multiple of 16 elements and lies side by side. `tma`: descriptors can show X, W, Y.
    Least cost first: waves, times a tile's area and the traffic of its edges, which small tiles pay more often.
    """

    def cost(tile: Tile) -> float:
        waves = ceil_div(ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n), count)
        return waves * (tile.block_m * tile.block_n + 32 * (tile.block_m + tile.block_n))

    tiles = tma and target.has_tma and gemm_row(target, kind, R, aligned, dropout, True)
    return tuple(sorted(tiles or gemm_row(target, kind, R, aligned, dropout, False), key=cost)[:3])
