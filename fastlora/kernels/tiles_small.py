"""How the rank-R kernels cut their work: pure functions of (target, shape, dtype), with the tables beneath them."""

from __future__ import annotations

import functools

import torch

from fastlora.kernels.tiles import Target, Tile, padded_rank

# Programs that keep every multiprocessor of the largest common part of an architecture busy. Nominal, so that the order of
# additions, and with it every bit of a result, depends on the architecture alone.
PROGRAMS = {0: 4, 75: 144, 80: 216, 86: 168, 89: 256, 90: 264, 100: 296, 120: 340, "gfx942": 608, "gfx950": 512}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _programs(target: Target) -> int:
    return PROGRAMS[target.family.arch]


@functools.lru_cache(maxsize=1024)
def s_cut(target: Target, M: int, K: int, R: int, dtype: torch.dtype) -> tuple[Tile, int, int]:
    """Tile, number of splits of K, and columns of each split, for `s_kernel`."""
    tile = Tile(32, 0, 64, 4, 3)
    rows = ceil_div(M, tile.block_m)
    return (tile, *_split(K, tile.block_k, 2048, _programs(target) // rows))


def _split(length: int, block: int, least: int, wanted: int) -> tuple[int, int]:
    """(splits, length of each): at most `wanted` splits, each a multiple of `block` and no shorter than `least`."""
    splits = max(1, min(wanted, length // least))
    each = ceil_div(ceil_div(length, splits), block) * block
    return ceil_div(length, each), each


@functools.lru_cache(maxsize=1024)
def ds_db_cut(target: Target, M: int, N: int, R: int, dtype: torch.dtype) -> tuple[Tile, int] | None:
    """Tile and rows of a region for `ds_db_kernel`; None where reading dY twice moves fewer bytes than the partials."""
    if padded_rank(R) >= 64:
        return None
    tile = Tile(32, 64, 0, 4, 2)
    columns = ceil_div(N, tile.block_n)
    _, region_m = _split(M, tile.block_m, 64, _programs(target) // columns)
    return tile, region_m


@functools.lru_cache(maxsize=1024)
def da_cut(target: Target, M: int, K: int, R: int, dtype: torch.dtype) -> tuple[Tile, int, int]:
    """Tile, number of splits of M, and rows of each split, for `da_kernel`."""
    tile = Tile(32, 0, 64, 4, 3)
    columns = ceil_div(K, tile.block_k)
    return (tile, *_split(M, tile.block_m, 64, _programs(target) // columns))


@functools.lru_cache(maxsize=1024)
def onepass_tile(target: Target, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> Tile:
    """Tile of `onepass_kernel`."""
    return Tile(32, 64, 64, 4, 3)
