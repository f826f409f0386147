"""The choice of tiles: every target has some for every kernel, cuts cover a matrix once, and partials stay small."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastlora.kernels import gemm
from fastlora.kernels.tiles import (
    GEMM_TILES,
    INTERPRETER,
    RANK_TILES,
    TARGETS,
    WARP_SPECIALISED,
    Target,
    ceil_div,
    ds_db_tile,
    gemm_tiles,
    rank_tiles,
    regions,
    split_k,
    split_m,
)  # fmt: skip

HOPPER = Target("cuda", 90)
SHAPES = [(1, 1), (64, 100), (960, 768), (8192, 4096), (100_000, 384), (33, 50_000)]


def kinds(target: Target):
    return ("half", "ieee", "tf32") if target.backend == "cuda" and target.arch >= 80 else ("half", "ieee")


@pytest.mark.parametrize("target", [*TARGETS, INTERPRETER], ids=str)
@pytest.mark.parametrize("R", [1, 16, 17, 33, 128])
def test_every_kernel_has_up_to_three_tiles_and_splits_cover_each_element_once(target, R):
    for kind, kernel in itertools.product(kinds(target), RANK_TILES):
        tiles = rank_tiles(kernel, target, R, kind)
        assert len(tiles) <= 3 and (tiles or (kernel == "ds_db" and R > 32))
        for tile, (M, K) in itertools.product(tiles, SHAPES):
            assert tile.block_k % 8 == 0  # the mask's columns come by eights
            for cut, length, block in ((split_k, K, tile.block_k), (split_m, M, tile.block_m)):
                if block and kernel not in ("ds_db", "up"):
                    splits, each = cut(target, M, K, tile)
                    assert (splits - 1) * each < length <= splits * each and each % block == 0


@pytest.mark.parametrize("target", [*TARGETS, INTERPRETER], ids=str)
def test_every_kernel_has_a_tile_for_the_ranks_of_a_bank(target):
    for kind, kernel in itertools.product(kinds(target), RANK_TILES):
        found = rank_tiles(kernel, target, 256, kind)
        none = kernel == "ds_db" or (target.arch == 75 and kind == "half" and kernel in ("s", "onepass"))
        assert len(found) == (not none) and rank_tiles(kernel, target, 257, kind) == ()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_partials_stay_below_what_they_save(target):
    for (kind, itemsize), (M, N), R in itertools.product((("half", 2), ("ieee", 4)), SHAPES, (1, 16, 32, 128)):
        tile = ds_db_tile(target, M, N, R, kind, itemsize)
        if tile is not None:
            parts_n = ceil_div(N, tile.block_n)
            parts_m, region_m = regions(target, M, tile, parts_n)
            assert region_m % tile.block_m == 0
            assert 8 * R * (M * parts_n * (parts_n > 1) + N * parts_m * (parts_m > 1)) <= M * N * itemsize


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", ["half", "ieee"])
def test_the_gemm_has_up_to_three_tiles_of_its_table(target, kind):
    listed = {replace(tile, num_stages=0) for row in GEMM_TILES[target.family].values() for tile in row}
    for (M, N), R, aligned, dropout, tma in itertools.product(SHAPES, (16, 128), *[(True, False)] * 3):
        tiles = gemm_tiles(target, M, N, R, kind, aligned, dropout, tma, target.multiprocessors)
        assert 1 <= len(tiles) <= 3 and {replace(tile, num_stages=0) for tile in tiles} <= listed  # stages: what fits
        assert tma or not any(tile.tma for tile in tiles)


def test_few_rows_get_a_low_tile_and_many_a_large_one():
    for target in TARGETS[1:]:  # Turing has one tile
        few, many = (gemm_tiles(target, M, 4096, 16, "half", True, False, False, 128)[0] for M in (16, 16384))
        assert few.block_m < many.block_m and few.block_m * few.block_n < many.block_m * many.block_n


def test_the_warp_specialised_gemm_stands_before_its_own_cut_where_it_can_run():
    def tried(target=HOPPER, M=8192, N=4096, R=16, dtype=torch.bfloat16, adapter=torch.bfloat16, by_n=True, offset=0):
        x, y = (torch.empty(M, n, dtype=dtype, device="meta") for n in (4096, N))
        w = torch.empty(N * 4096, dtype=dtype, device="meta")
        w = w.view(N, 4096).t() if by_n else w.view(4096, N)
        u = torch.empty(offset + N * R, dtype=adapter, device="meta")[offset:].view(N, R).t()
        tiles = gemm.candidates(target, x, w, u, False, y)
        found = [i for i, tile in enumerate(tiles) if tile.ws]
        assert len(tiles) <= 3 and all(replace(t, ws=True) == WARP_SPECIALISED for i in found for t in tiles[i : i + 2])
        return bool(found)

    assert tried() and tried(dtype=torch.float16, adapter=torch.float16) and tried(N=4104, R=8)
    assert not tried(target=Target("cuda", 100)) and not tried(target=Target("cuda", 80)) and not tried(M=16)
    assert not tried(dtype=torch.float32, adapter=torch.float32) and not tried(adapter=torch.float32)
    assert not tried(R=12) and not tried(by_n=False) and not tried(offset=1) and not tried(N=4100)


def test_unknown_gpus_get_a_relatives_tile():
    for unknown, known in [(87, 80), (103, 100), (121, 120), (70, 75), ("gfx90a", "gfx942"), ("gfx1100", "gfx942")]:
        backend = "hip" if isinstance(unknown, str) else "cuda"
        for kernel in RANK_TILES:
            assert rank_tiles(kernel, Target(backend, unknown), 8, "half") == rank_tiles(
                kernel, Target(backend, known), 8, "half"
            )


def test_programs_of_a_multiprocessor():
    ampere, hopper = Target("cuda", 80), Target("cuda", 90)
    assert hopper.programs(168, 225_312, 8) == 1
    assert ampere.programs(128, 0, 4) == 4 and ampere.programs(129, 0, 4) == 3  # registers, in eights a thread
    assert ampere.programs(32, 54 * 1024, 4) == 2  # a KiB of each program is the driver's
