"""The cuts of the rank-R kernels: every target has one, and it covers the matrix once."""

from __future__ import annotations

import pytest

from fastlora.kernels.tiles import INTERPRETER, TARGETS, Target
from fastlora.kernels.tiles_small import ceil_div, da_cut, ds_db_cut, onepass_tile, s_cut

SHAPES = [(1, 1), (64, 100), (960, 768), (8192, 4096), (100_000, 384), (33, 50_000)]


def kinds(target: Target):
    return ("half", "ieee", "tf32") if target.backend == "cuda" and target.arch >= 80 else ("half", "ieee")


@pytest.mark.parametrize("target", [*TARGETS, INTERPRETER], ids=str)
@pytest.mark.parametrize("R", [1, 16, 17, 33, 128])
def test_splits_cover_each_element_once(target, R):
    for kind in kinds(target):
        for M, K in SHAPES:
            for cut, length, block in ((s_cut, K, "block_k"), (da_cut, M, "block_m")):
                tile, splits, each = cut(target, M, K, R, kind)
                assert (splits - 1) * each < length <= splits * each
                assert each % getattr(tile, block) == 0
                assert tile.block_k % 8 == 0  # the mask's columns come by eights
            region = ds_db_cut(target, M, K, R, kind)
            assert region is None or region[1] % region[0].block_m == 0
            tile = onepass_tile(target, M, K, K, R, kind)
            assert min(tile.block_m, tile.block_n, tile.block_k) >= 16


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_partials_stay_below_what_they_save(target):
    for kind, itemsize in (("half", 2), ("ieee", 4)):
        for M, N in SHAPES:
            for R in (1, 16, 32, 128):
                cut = ds_db_cut(target, M, N, R, kind)
                if cut is not None:
                    parts_n, parts_m = ceil_div(N, cut[0].block_n), ceil_div(M, cut[1])
                    read_twice = 8 * R * (M * parts_n * (parts_n > 1) + N * parts_m * (parts_m > 1))
                    assert read_twice <= M * N * itemsize


def test_unknown_architectures_get_a_relative():
    for target in (Target("cuda", 87), Target("cuda", 103), Target("cuda", 121), Target("hip", "gfx90a")):
        assert s_cut(target, 64, 64, 8, "half")[0] == s_cut(target.family, 64, 64, 8, "half")[0]
