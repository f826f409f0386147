"""How the rank-R kernels cut their work: tables, and pure functions of (target, shape, type of product) that pick.

Every tile listed compiles without spilling registers and within shared memory, aligned or not, with dropout or without:
`python -m fastlora.kernels.matrix` shows it. The order of preference was arithmetic (bytes in flight, programs on a
multiprocessor), not measurement: no GPU has timed it.
"""

from __future__ import annotations

import functools

import torch

from fastlora.kernels.tiles import Target, Tile

# Two programs for each multiprocessor of an architecture's largest common card. Nominal, so that the order of
# additions, and with it every bit of a result, depends on the architecture alone.
PROGRAMS = {0: 4, 75: 144, 80: 216, 86: 168, 89: 256, 90: 264, 100: 296, 120: 340, "gfx942": 608, "gfx950": 512}
# Whose row an architecture takes where a table has none of its own.
LIKE = {89: 86, 120: 86, 100: 90, "gfx950": "gfx942"}

Cut = tuple[int, int, int, int]  # two edges, warps, stages

# arch -> type of product -> the cut for R <= 32 and the cut for more.
# `s_kernel`: BLOCK_M, BLOCK_K. Preferred: 128 bytes of a row or more; half of the shared memory, so that two fit.
S: dict[int | str, dict[str, tuple[Cut, Cut]]] = {
    75: {"half": ((32, 64, 8, 3), (16, 32, 8, 2)), "ieee": ((32, 64, 4, 4), (32, 32, 4, 3))},
    80: {
        "half": ((32, 128, 4, 4), (32, 64, 8, 3)),
        "ieee": ((32, 64, 4, 4), (32, 32, 4, 2)),
        "tf32": ((32, 64, 4, 4), (32, 32, 4, 3)),
    },
    86: {
        "half": ((32, 64, 4, 4), (32, 32, 4, 3)),
        "ieee": ((32, 64, 4, 3), (16, 32, 4, 2)),
        "tf32": ((32, 64, 4, 3), (32, 32, 4, 3)),
    },
    90: {
        "half": ((32, 128, 8, 5), (32, 32, 8, 3)),
        "ieee": ((32, 64, 8, 3), (32, 64, 8, 3)),
        "tf32": ((32, 64, 8, 4), (32, 32, 8, 3)),
    },
    100: {
        "half": ((32, 128, 8, 4), (32, 32, 8, 3)),
        "ieee": ((32, 64, 8, 3), (32, 64, 8, 3)),
        "tf32": ((32, 64, 8, 4), (32, 32, 8, 3)),
    },
    120: {
        "half": ((32, 64, 4, 4), (32, 32, 4, 3)),
        "ieee": ((32, 64, 4, 3), (16, 32, 8, 2)),
        "tf32": ((32, 64, 8, 3), (32, 32, 8, 3)),
    },
    "gfx942": {"half": ((32, 64, 4, 4), (32, 32, 4, 2)), "ieee": ((32, 32, 4, 3), (32, 32, 4, 2))},
}

# `da_kernel`: BLOCK_M, BLOCK_K. Preferred as above.
DA: dict[int | str, dict[str, tuple[Cut, Cut]]] = {
    75: {"half": ((32, 64, 4, 3), (16, 32, 4, 2)), "ieee": ((32, 64, 4, 3), (16, 32, 4, 2))},
    80: {
        "half": ((64, 128, 4, 4), (64, 64, 4, 4)),
        "ieee": ((32, 64, 4, 3), (16, 32, 4, 2)),
        "tf32": ((64, 64, 4, 3), (32, 64, 4, 3)),
    },
    86: {
        "half": ((64, 64, 4, 4), (32, 64, 8, 3)),
        "ieee": ((32, 64, 4, 3), (16, 32, 4, 2)),
        "tf32": ((32, 64, 4, 3), (32, 32, 4, 3)),
    },
    90: {
        "half": ((64, 128, 4, 4), (64, 64, 8, 4)),
        "ieee": ((32, 64, 4, 3), (16, 32, 4, 2)),
        "tf32": ((64, 64, 4, 4), (32, 64, 4, 3)),
    },
    120: {
        "half": ((64, 64, 4, 4), (32, 64, 4, 3)),
        "ieee": ((32, 64, 4, 3), (16, 32, 4, 2)),
        "tf32": ((32, 64, 4, 3), (32, 32, 4, 3)),
    },
    "gfx942": {"half": ((64, 128, 4, 4), (32, 64, 4, 3)), "ieee": ((32, 64, 4, 3), (32, 32, 4, 2))},
}

# `ds_db_kernel`: BLOCK_M, BLOCK_N, for padded ranks 16 and 32. Preferred: a region as wide as its registers allow, for
# the partials of dS cost 8 * R / (BLOCK_N * itemsize) of dY's bytes; None where no region holds.
DS_DB: dict[int | str, dict[str, tuple[Cut | None, Cut | None]]] = {
    75: {"half": ((32, 64, 8, 2), (32, 64, 8, 2)), "ieee": ((32, 64, 8, 2), (32, 64, 8, 2))},
    80: {
        "half": ((64, 512, 8, 3), (32, 512, 8, 3)),
        "ieee": ((32, 64, 8, 2), (32, 64, 8, 2)),
        "tf32": ((64, 256, 8, 3), (64, 256, 8, 3)),
    },
    86: {
        "half": ((64, 512, 8, 3), (32, 512, 8, 3)),
        "ieee": ((32, 64, 8, 2), (32, 64, 8, 2)),
        "tf32": ((32, 256, 8, 2), (32, 64, 8, 2)),
    },
    90: {
        "half": ((64, 512, 8, 3), (64, 256, 8, 3)),
        "ieee": ((32, 64, 8, 2), (32, 64, 8, 2)),
        "tf32": ((64, 256, 8, 3), (64, 256, 8, 3)),
    },
    100: {
        "half": ((32, 512, 8, 3), (64, 256, 8, 3)),
        "ieee": ((32, 64, 8, 2), (32, 64, 8, 2)),
        "tf32": ((32, 256, 8, 3), (32, 256, 8, 3)),
    },
    "gfx942": {"half": ((32, 256, 8, 2), (32, 128, 8, 2)), "ieee": ((32, 64, 8, 2), (32, 64, 8, 2))},
}

# `onepass_kernel`: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages.
ONEPASS: dict[int | str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    75: {"half": ((32, 32, 16, 8, 2), (16, 16, 16, 8, 2)), "ieee": ((32, 32, 16, 8, 2), (16, 16, 16, 8, 2))},
    80: {
        "half": ((64, 64, 32, 4, 3), (32, 32, 32, 4, 3)),
        "ieee": ((32, 64, 32, 8, 3), (16, 32, 16, 8, 2)),
        "tf32": ((32, 32, 32, 4, 3), (32, 32, 32, 4, 3)),
    },
    86: {
        "half": ((32, 64, 32, 4, 3), (32, 64, 32, 8, 3)),
        "ieee": ((32, 64, 32, 8, 3), (16, 32, 16, 8, 2)),
        "tf32": ((32, 32, 32, 4, 3), (32, 32, 16, 4, 2)),
    },
    90: {
        "half": ((64, 64, 32, 4, 3), (32, 64, 32, 8, 3)),
        "ieee": ((32, 32, 16, 8, 3), (32, 32, 16, 8, 2)),
        "tf32": ((32, 32, 32, 4, 3), (32, 32, 16, 4, 2)),
    },
    120: {
        "half": ((32, 64, 32, 4, 3), (32, 64, 32, 4, 3)),
        "ieee": ((32, 32, 32, 8, 3), (16, 32, 16, 8, 2)),
        "tf32": ((32, 32, 32, 4, 3), (32, 32, 16, 4, 2)),
    },
    "gfx942": {"half": ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2)), "ieee": ((32, 64, 32, 4, 2), (32, 32, 32, 4, 2))},
}

INTERPRETER_CUT = (32, 64, 4, 1)


def _row(table: dict, target: Target, kind: str):
    arch = target.family.arch
    return table[arch if arch in table else LIKE[arch]][kind]


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The column of the tables: "half" for 16-bit types, else the precision of float32 products."""
    return precision if dtype == torch.float32 else "half"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _split(length: int, block: int, least: int, wanted: int) -> tuple[int, int]:
    """(splits, length of each): at most `wanted` splits, each a multiple of `block` and hardly shorter than `least`."""
    splits = max(1, min(wanted, length // least))
    each = ceil_div(ceil_div(length, splits), block) * block
    return ceil_div(length, each), each


def _programs(target: Target) -> int:
    return PROGRAMS[target.family.arch]


def _least(target: Target, length: int) -> int:
    """The shortest split; in the interpreter short enough for small matrices to be split."""
    return 64 if target.backend == "interpreter" else length


@functools.lru_cache(maxsize=1024)
def s_cut(target: Target, M: int, K: int, R: int, kind: str) -> tuple[Tile, int, int]:
    """Tile, number of splits of K, and columns of each split, for `s_kernel`.

    A split shorter than 2048 columns takes less time than the launch that adds the partials.
    """
    block_m, block_k, warps, stages = _pick(S, target, R > 32, kind)
    splits = _split(K, block_k, _least(target, 2048), _programs(target) // ceil_div(M, block_m))
    return (Tile(block_m, 0, block_k, warps, stages), *splits)


@functools.lru_cache(maxsize=1024)
def da_cut(target: Target, M: int, K: int, R: int, kind: str) -> tuple[Tile, int, int]:
    """Tile, number of splits of M, and rows of each split, for `da_kernel`."""
    block_m, block_k, warps, stages = _pick(DA, target, R > 32, kind)
    splits = _split(M, block_m, _least(target, 512), _programs(target) // ceil_div(K, block_k))
    return (Tile(block_m, 0, block_k, warps, stages), *splits)


@functools.lru_cache(maxsize=1024)
def ds_db_cut(target: Target, M: int, N: int, R: int, kind: str) -> tuple[Tile, int] | None:
    """Tile and rows of a region for `ds_db_kernel`; None where reading dY twice moves fewer bytes than the partials."""
    if R > 32:
        return None
    cut = _pick(DS_DB, target, R > 16, kind)
    if cut is None:
        return None
    block_m, block_n, warps, stages = cut
    parts_n = ceil_div(N, block_n)
    # A region fills a multiprocessor by itself, so one program on each is enough.
    parts_m, region_m = _split(M, block_m, _least(target, 256), _programs(target) // 2 // parts_n)
    partials = 8 * R * (parts_n * M * (parts_n > 1) + parts_m * N * (parts_m > 1))
    if partials > M * N * (2 if kind == "half" else 4) and target.backend != "interpreter":
        return None
    return Tile(block_m, block_n, 0, warps, stages), region_m


def _pick(table: dict, target: Target, second: bool, kind: str) -> Cut | None:
    if target.backend == "interpreter":
        return INTERPRETER_CUT
    return _row(table, target, kind)[second]


@functools.lru_cache(maxsize=1024)
def onepass_tile(target: Target, M: int, N: int, K: int, R: int, kind: str) -> Tile:
    """Tile of `onepass_kernel`."""
    if target.backend == "interpreter":
        return Tile(32, 64, 64, 4, 1)
    return Tile(*_row(ONEPASS, target, kind)[R > 32])
