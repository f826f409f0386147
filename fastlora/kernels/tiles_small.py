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
