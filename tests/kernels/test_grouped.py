"""The launches of several projections at once, against the error rule; and when there is one, when several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judge import DTYPES, draw, judge, paired

from fastlora.kernels import gemm_each, grouped, tiles
from fastlora.kernels.tiles import Target
from fastlora.record import recording

pytestmark = pytest.mark.usefixtures("poisoned")

M, K = 70, 90
CASES = [((40, 1), (24, 16), (1, 5)), ((130, 20), (20, 20)), ((17, 8), (33, 8), (20, 8), (24, 3))]  # (N, R) of each
KINDS = [*((dtype, dtype) for dtype in DTYPES), (torch.float16, torch.float32)]


def drawn(case, dtype, adapter_dtype):
    """S, B, bias and empty y of each."""
    Ss = [draw(M, R, dtype=dtype, seed=1 + i) for i, (_, R) in enumerate(case)]
    Bs = [draw(N, R, dtype=adapter_dtype, seed=10 + i) for i, (N, R) in enumerate(case)]
    biases = [draw(N, dtype=dtype, seed=20 + i) for i, (N, _) in enumerate(case)]
    return Ss, Bs, biases, [torch.empty(M, N, dtype=dtype) for N, _ in case]


def launched(function, *operands):
    """The names of the kernels, and what is returned."""
    with recording() as launches:
        result = function(*operands)
    return [launch.fn.__name__ for launch, _ in launches], result


@pytest.mark.parametrize(("case", "kind", "bias"), paired(CASES, KINDS, [True, False]))
def test_updates(case, kind, bias):
    dtype, adapter_dtype = kind
    Ss, Bs, biases, ys = drawn(case, dtype, adapter_dtype)
    biases = biases if bias else [None] * len(case)
    names, _ = launched(grouped.up_each, Ss, Bs, biases, ys)
    assert names == ["up_each_kernel"] + ["up_kernel"] * (len(case) - 3)
    for S, B, b, y in zip(Ss, Bs, biases, ys, strict=True):
        judge(y, lambda S, B, *b: S @ B.T + sum(b), S, B, *([] if b is None else [b]), dtype=dtype)


@pytest.mark.parametrize(("case", "kind", "transposed"), paired(CASES, KINDS, [False, True]))
def test_products_with_their_updates(case, kind, transposed):
    dtype, adapter_dtype = kind
    Ss, Bs, biases, ys = drawn(case, dtype, adapter_dtype)
    x = draw(M, K, dtype=dtype, seed=30)
    weights = [draw(N, K, dtype=dtype, seed=40 + i) for i, (N, _) in enumerate(case)]
    if transposed:  # as Conv1D has them: then programs can pick only where all are as wide
        weights = [W.t().contiguous().t() for W in weights]
    names, _ = launched(gemm_each.gemm_each, x, weights, biases, Ss, Bs, ys)
    alone = len(case) if transposed else len(case) - 3
    assert names == ["gemm_each_kernel"] * (not transposed) + ["gemm_kernel"] * alone
    for S, B, b, W, y in zip(Ss, Bs, biases, weights, ys, strict=True):
        judge(y, lambda x, W, S, B, b: x @ W.T + S @ B.T + b, x, W, S, B, b, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_S_and_B(case, kind):
    dtype, adapter_dtype = kind
    Ss, Bs, _, ys = drawn(case, dtype, adapter_dtype)
    dys = [draw(*y.shape, dtype=dtype, seed=50 + i) for i, y in enumerate(ys)]
    names, (dSs, dBs) = launched(grouped.ds_db_each, dys, Bs, Ss, [1.5] * len(case))
    assert names[0] == "ds_db_each_kernel" and len(names) <= 2 + 2 * (len(case) > 3)
    for S, B, dy, dS, dB in zip(Ss, Bs, dys, dSs, dBs, strict=True):
        assert dB.dtype is B.dtype
        judge(dS, lambda dy, B: 1.5 * dy @ B, dy, B, dtype=dtype)
        judge(dB, lambda dy, S: dy.T @ S, dy, S, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_their_sum_is_added_to_dx(case, dtype):
    dys = [draw(M, N, dtype=dtype, seed=50 + i) for i, (N, _) in enumerate(case)]
    weights = [draw(N, K, dtype=dtype, seed=40 + i) for i, (N, _) in enumerate(case)]
    weights[1] = weights[1].t().contiguous().t()
    before = draw(M, K, dtype=dtype, seed=60)
    dx = before.clone()
    names, _ = launched(gemm_each.gemm_sum, dys, weights, dx)
    assert names == ["gemm_sum_kernel"] * (1 + len(case) // 4)

    def total(before, *pairs):
        return before + sum(dy @ W for dy, W in zip(pairs[::2], pairs[1::2], strict=True))

    judge(dx, total, before, *(t for pair in zip(dys, weights, strict=True) for t in pair), dtype=dtype)


def test_regions_and_partials(monkeypatch):
    """Two parts along N for one projection, one for the other; several regions along M."""
    tile = tiles.rank_tiles("ds_db", tiles.INTERPRETER, 16, "ieee")[0]
    monkeypatch.setattr(tiles, "rank_tiles", lambda *_: (replace(tile, block_m=16, block_n=32),))
    monkeypatch.setattr(tiles, "regions", lambda *_: (3, 32))
    test_gradients_of_S_and_B(((40, 3), (24, 16)), KINDS[0])
    test_gradients_of_S_and_B(((24, 3), (32, 3), (20, 3)), KINDS[0])


def test_what_programs_cannot_pick_among_is_launched_one_by_one():
    Ss, Bs, biases, ys = drawn(CASES[0], torch.float32, torch.float32)
    apart = torch.zeros(2 * len(biases[1]))[::2]
    for B, bias in ((Bs[1].half(), biases[1]), (Bs[1], None), (Bs[1], apart)):
        names, _ = launched(grouped.up_each, Ss, [Bs[0], B, Bs[2]], [biases[0], bias, biases[2]], ys)
        assert names == ["up_kernel"] * 3


def test_a_sum_through_descriptors_is_of_weights_that_lie_one_way():
    target, half = Target("cuda", 90), torch.bfloat16
    dys, dx = [torch.empty(64, 256, dtype=half)] * 3, torch.empty(64, 256, dtype=half)
    W = torch.empty(256, 256, dtype=half)
    for weights, tma in (([W] * 3, True), ([W.t()] * 3, True), ([W, W, W.t()], False), ([W.t(), W, W], False)):
        launch = gemm_each.gemm_sum_launch(target, dys, weights, dx)
        assert ("dx_desc" in launch.args) == tma


def test_a_persistent_sum_is_checked_with_programs_of_several_tiles():
    """What `turns` says decides on how many rows the self-check looks."""
    target, half = Target("cuda", 90), torch.bfloat16
    for M, turns in ((2048, 1), (4096, 2)):
        dys, W = [torch.empty(M, 4096, dtype=half)] * 3, torch.empty(4096, 2048, dtype=half)
        launch = gemm_each.gemm_sum_launch(target, dys, [W] * 3, torch.empty(M, 2048, dtype=half))
        assert launch.turns == turns
