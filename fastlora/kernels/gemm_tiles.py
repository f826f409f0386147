"""Which tile the GEMM runs with: a table for each architecture, and the arithmetic that picks from it.

A tile belongs here when it compiles on its architecture without spilling registers and within shared memory, for all
that its row can be asked: `python -m fastlora.kernels.matrix` tells. The choice within a row is arithmetic (waves over
the multiprocessors, times the work of a wave), not measurement: no GPU has timed it.
"""

from __future__ import annotations

import torch

from fastlora.kernels.tiles import Target, Tile

INTERPRETER_TILE = Tile(32, 32, 32, num_warps=4, num_stages=1, group_m=2)
INTERPRETER_TMA_TILE = Tile(32, 32, 32, num_warps=4, num_stages=1, group_m=2, persistent=True, tma=True)

# Multiprocessors of the usual card of each architecture, for a caller that has no device to ask.
USUAL_MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx942": 304, "gfx950": 256}


WIDE = 32  # a rank above this is multiplied in several steps, which take registers


def _cut(*cuts: tuple[int, int, int, int, int], tma: bool = False) -> tuple[Tile, ...]:
    return tuple(Tile(*cut, persistent=tma, tma=tma) for cut in cuts)


# Rows of a table: "tma" and "tma dropout" through descriptors, "aligned" and "ragged" through pointers; 16-bit types,
# or float32 whose products are "tf32" or "float32"; " wide" for a rank above WIDE, where that needs other tiles. A cut
# is BLOCK_M, BLOCK_N, BLOCK_K, warps, stages.
_COMMON = {
    "aligned": _cut((128, 128, 64, 8, 2), (64, 64, 64, 4, 3), (32, 64, 64, 4, 3)),
    "ragged": _cut((64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
    "aligned tf32": _cut((64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
    "ragged tf32": _cut((64, 64, 32, 8, 3), (32, 32, 32, 4, 2)),
    "aligned float32": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
    "ragged float32": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
}
_CDNA = {
    "aligned": _cut((128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 64, 64, 4, 2)),
    "aligned wide": _cut((64, 64, 64, 4, 2), (32, 64, 64, 4, 2)),
    "ragged": _cut((64, 64, 32, 4, 2)),
    "aligned float32": _cut((64, 64, 32, 4, 2)),
    "ragged float32": _cut((32, 64, 32, 4, 2)),
}
TABLE: dict[int | str, dict[str, tuple[Tile, ...]]] = {
    75: {  # no matrix instructions for these kernels: all products in registers
        "aligned": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
        "ragged": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
        "aligned float32": _cut((16, 32, 16, 8, 1)),
        "ragged float32": _cut((64, 64, 16, 8, 2), (32, 64, 16, 4, 1)),
    },
    80: _COMMON
    | {
        "aligned": _cut((128, 128, 64, 8, 4), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "aligned wide": _cut((128, 128, 64, 8, 4), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "ragged": _cut((128, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
        "aligned tf32": _cut((128, 128, 32, 8, 3), (64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
        "ragged tf32": _cut((32, 32, 32, 4, 2)),
        "ragged float32": _cut((32, 64, 16, 4, 1)),
    },
    86: _COMMON | {"ragged tf32 wide": _cut((32, 32, 32, 4, 2))},
    89: _COMMON | {"ragged tf32 wide": _cut((32, 32, 32, 4, 2))},
    90: _COMMON
    | {
        "tma": _cut((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), tma=True),
        "tma dropout": _cut((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 4), tma=True),
        "tma dropout wide": _cut((128, 128, 64, 8, 4), (64, 64, 64, 4, 4), tma=True),
        "aligned": _cut((128, 256, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "aligned wide": _cut((128, 128, 64, 8, 4), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        "ragged": _cut((128, 128, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
        "aligned tf32": _cut((128, 128, 32, 8, 3), (64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
        "ragged tf32": _cut((128, 64, 32, 8, 3), (64, 64, 32, 8, 3), (32, 32, 32, 4, 2)),
        "aligned float32": _cut((32, 64, 16, 4, 1)),
    },
    100: _COMMON
    | {
        "tma": _cut((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), tma=True),
        "tma wide": _cut((128, 128, 64, 8, 4), tma=True),
        "tma dropout": _cut((128, 256, 64, 8, 3), (64, 64, 64, 4, 4), tma=True),
        "aligned": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (32, 64, 64, 4, 3)),
        "aligned wide": _cut((128, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
    },
    120: _COMMON
    | {
        "aligned wide": _cut((128, 128, 64, 8, 2), (64, 64, 64, 4, 3)),
        "aligned float32": _cut((32, 64, 16, 4, 1)),
    },
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}


def row_of(dtype: torch.dtype, precision: str, aligned: bool, dropout: bool, tma: bool) -> str:
    """The row of a table, without " wide": "tma", "tma dropout", "aligned", "ragged tf32", "aligned float32", ..."""
    if tma and dtype != torch.float32:
        return "tma dropout" if dropout else "tma"
    row = "aligned" if aligned else "ragged"
    if dtype != torch.float32:
        return row
    return f"{row} tf32" if precision == "tf32" else f"{row} float32"


def tma_holds(aligned: bool, dropout: bool, R: int) -> bool:
    """False for the one case whose registers spill through descriptors: a wide dropped update on rows not aligned."""
    return aligned or not dropout or R <= WIDE


def tiles_of(target: Target, row: str, R: int) -> tuple[Tile, ...]:
    """The tiles of a row for rank R, large ones first; empty when the architecture has no such row."""
    table = TABLE[target.family.arch]
    return table.get(f"{row} wide" if R > WIDE else row, table.get(row, ()))


def _cost(tile: Tile, M: int, N: int, multiprocessors: int) -> float:
    """Waves times the time of one: a tile's area, and the traffic of its edges, which small tiles pay more often."""
    waves = -(-(-(-M // tile.block_m) * -(-N // tile.block_n)) // multiprocessors)
    return waves * (tile.block_m * tile.block_n + 32 * (tile.block_m + tile.block_n))


def gemm_tile(
    target: Target,
    kind: str,
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    aligned: bool,
    *,
    dropout: bool = False,
    precision: str = "ieee",
    tma: bool = False,
    multiprocessors: int | None = None,
) -> Tile:
    """The tile for Y (M, N) = X (M, K) W (K, N) + S U of rank R; a pure function.

    `kind` is "forward" or "dx" (both share the table today). `aligned`: every row starts at a multiple of 16 elements
    and lies side by side. `tma`: the operands can be described to the tensor memory accelerator, which is used where
    the architecture's table has a row for it.
    """
    if target.backend == "interpreter":
        return INTERPRETER_TMA_TILE if tma else INTERPRETER_TILE
    tiles = tiles_of(target, row_of(dtype, precision, aligned, dropout, tma), R)
    if not tiles:  # no descriptors in this architecture's table
        tiles = tiles_of(target, row_of(dtype, precision, aligned, dropout, tma=False), R)
    count = multiprocessors or USUAL_MULTIPROCESSORS[target.family.arch]
    return min(tiles, key=lambda tile: _cost(tile, M, N, count))
