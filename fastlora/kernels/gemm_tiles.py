"""Which tile the GEMM runs with: a table for each architecture, and the arithmetic that picks from it.

Every tile listed compiles on its architecture without spilling registers and within shared memory, for both kinds, any rank
and with or without dropout: `python -m fastlora.kernels.matrix` shows it. The order of preference within a list is
arithmetic (waves over the multiprocessors, times the work of a wave), not measurement: no GPU has timed it.
"""

from __future__ import annotations

import torch

from fastlora.kernels.tiles import Target, Tile

INTERPRETER_TILE = Tile(32, 32, 32, num_warps=4, num_stages=1, group_m=2)
INTERPRETER_TMA_TILE = Tile(32, 32, 32, num_warps=4, num_stages=1, group_m=2, persistent=True, tma=True)

# Multiprocessors of the usual card of each architecture, for a caller that has no device to ask.
USUAL_MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx942": 304, "gfx950": 256}


def _pointer(*cuts: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(Tile(*cut) for cut in cuts)


def _tma(*cuts: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(Tile(*cut, persistent=True, tma=True) for cut in cuts)


# arch -> case -> tiles. The cases: "tma" (and "tma dropout") through descriptors; "aligned" and "ragged" through pointers; in
# 16-bit types unless they end in "tf32" or "float32". BLOCK_M, BLOCK_N, BLOCK_K, warps, stages.
_SMALL = _pointer((64, 64, 64, 4, 3), (32, 64, 64, 4, 3))
TABLE: dict[int | str, dict[str, tuple[Tile, ...]]] = {
    arch: {
        "aligned": _pointer((64, 64, 64, 4, 3)),
        "ragged": _pointer((64, 64, 32, 4, 2)),
        "aligned tf32": _pointer((64, 64, 32, 4, 2)),
        "ragged tf32": _pointer((64, 64, 32, 4, 2)),
        "aligned float32": _pointer((64, 64, 16, 8, 2)),
        "ragged float32": _pointer((64, 64, 16, 8, 2)),
    }
    for arch in USUAL_MULTIPROCESSORS
}


def case_of(dtype: torch.dtype, precision: str, aligned: bool, dropout: bool, tma: bool) -> str:
    """The row of the table: "tma", "tma dropout", "aligned", "ragged", with " tf32" or " float32" for float32 products."""
    if tma:
        row = "tma dropout" if dropout else "tma"
    else:
        row = "aligned" if aligned else "ragged"
    if dtype != torch.float32:
        return row
    return row + (" tf32" if precision == "tf32" else " float32")


def _cost(tile: Tile, M: int, N: int, multiprocessors: int) -> float:
    """Waves times the time of one wave: a tile's area, and the traffic of its two edges, which small tiles pay more often."""
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

    `kind` is "forward" or "dx" (both share the table today). `aligned`: every row starts at 16 bytes and its
    elements lie side by side. `tma`: the operands can be described to the tensor memory accelerator; it is used where the
    architecture's table has a row for it.
    """
    if target.backend == "interpreter":
        return INTERPRETER_TMA_TILE if tma else INTERPRETER_TILE
    arch = target.family.arch
    table = TABLE[arch]
    case = case_of(dtype, precision, aligned, dropout, tma)
    if case not in table:
        case = case_of(dtype, precision, aligned, dropout, tma=False)
    count = multiprocessors or USUAL_MULTIPROCESSORS[arch]
    return min(table[case], key=lambda tile: _cost(tile, M, N, count))
