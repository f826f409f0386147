"""The GEMM with the rank-R update in the interpreter, forward and dX, by the error rule; and the choice of its tile."""

from __future__ import annotations

import math

import pytest
import torch
from judge import DTYPES, LAYOUTS, RANKS, draw, judge, paired, strided

from fastlora.kernels.dropout import Dropout, mask_bits, mask_launch
from fastlora.kernels.gemm import gemm_dx, gemm_forward, gemm_launch
from fastlora.kernels.grads import da
from fastlora.kernels.tiles import INTERPRETER_TMA, Target, Tile
from fastlora.paths.mask import philox_mask

pytestmark = pytest.mark.usefixtures("poisoned")

TMA = INTERPRETER_TMA


def seeded(p):
    return None if p is None else Dropout(p, torch.tensor([0x1234_5678_9ABC]))


def bits_of(dropout, M, K):
    """The mask as the GEMM reads it."""
    if dropout is None:
        return None
    bits = mask_bits(M, K, dropout.seed.device)
    mask_launch(dropout, bits).run()
    return bits


def check_forward(x, weight, bias, S, lora_B, **keywords):
    def formula(x, weight, S, lora_B, bias=None):
        y = x @ weight.T + S @ lora_B.T
        return y if bias is None else y + bias

    y = gemm_forward(x, weight, bias, S, lora_B, **keywords)
    assert y.dtype == x.dtype and y.is_contiguous()
    judge(y, formula, x, weight, S, lora_B, *([] if bias is None else [bias]), dtype=x.dtype)


def check_dx(dy, weight, dS, lora_A, dropout=None, **keywords):
    M, K = dy.shape[0], weight.shape[1]
    keep = torch.ones(1, 1) if dropout is None else philox_mask(dropout.seed, M, K, dropout.p)

    def formula(dy, weight, dS, lora_A):
        return dy @ weight + (dS @ lora_A) * keep.to(dy.dtype)

    dx = gemm_dx(dy, weight, dS, lora_A, bits_of(dropout, M, K), **keywords)
    assert dx.dtype == dy.dtype and dx.is_contiguous()
    judge(dx, formula, dy, weight, dS, lora_A, dtype=dy.dtype)


def operands(M, N, K, R, dtype, adapter_dtype=None):
    adapter = adapter_dtype or dtype
    return {
        "x": draw(M, K, dtype=dtype, seed=1),
        "weight": draw(N, K, dtype=dtype, seed=2),
        "bias": draw(N, dtype=dtype, seed=3),
        "S": draw(M, R, dtype=dtype, seed=4),
        "lora_B": draw(N, R, dtype=adapter, seed=5),
        "lora_A": draw(R, K, dtype=adapter, seed=6),
        "dy": draw(M, N, dtype=dtype, seed=7),
    }


@pytest.mark.parametrize(("R", "dtype", "p"), paired(RANKS, DTYPES, (None, 0.4)))
def test_every_rank(R, dtype, p):
    t = operands(35, 45, 50, R, dtype)
    check_forward(t["x"], t["weight"], t["bias"], t["S"], t["lora_B"])
    check_dx(t["dy"], t["weight"], t["S"], t["lora_A"], seeded(p))


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 70, 33), (33, 1, 65), (64, 64, 64), (31, 97, 5), (100, 32, 17)])
def test_ragged_sizes(M, N, K):
    t = operands(M, N, K, 4, DTYPES[M % 2])
    check_forward(t["x"], t["weight"], None, t["S"], t["lora_B"])
    check_dx(t["dy"], t["weight"], t["S"], t["lora_A"], seeded(0.25))


@pytest.mark.parametrize("R", [3, 16, 40])
@pytest.mark.parametrize("M, N, K", [(40, 72, 48), (8, 24, 104), (97, 32, 32)])
def test_descriptors(M, N, K, R):
    for dtype, by_row, p in paired(DTYPES, (True, False), (None, 0.4)):
        t = operands(M, N, K, R, dtype)
        weight = t["weight"] if by_row else t["weight"].t().contiguous().t()
        check_forward(t["x"], weight, t["bias"], t["S"], t["lora_B"], tile=TMA)
        check_dx(t["dy"], weight, t["S"], t["lora_A"], seeded(p), tile=TMA)


@pytest.mark.parametrize("N, K, offset", [(33, 32, 0), (32, 33, 0), (32, 32, 1)])
def test_descriptors_refuse_rows_that_are_not_16_byte_pieces(N, K, offset):
    t = operands(8, N, K, 2, torch.float16)
    x = torch.zeros(8 * K + offset, dtype=torch.float16)[offset:].view(8, K)
    with pytest.raises(ValueError, match="16-byte"):
        gemm_forward(x, t["weight"], None, t["S"], t["lora_B"], tile=TMA)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    t = {name: strided(v, layout) if v.dim() == 2 else v for name, v in operands(34, 37, 41, 5, torch.float32).items()}
    bias = torch.stack([t["bias"], torch.full_like(t["bias"], math.nan)], 1)[:, 0]
    check_forward(t["x"], t["weight"], bias, t["S"], t["lora_B"])
    check_dx(t["dy"], t["weight"], t["S"], t["lora_A"], seeded(0.5))


def test_expanded_gradient():
    t = operands(20, 24, 40, 2, torch.float32)
    check_dx(torch.ones(()).expand(20, 24), t["weight"], t["S"], t["lora_A"])


def test_float32_adapters_beside_half_tensors():
    t = operands(33, 40, 48, 9, torch.float16, torch.float32)
    for tile in (None, TMA):
        check_forward(t["x"], t["weight"], t["bias"], t["S"], t["lora_B"], tile=tile)
        check_dx(t["dy"], t["weight"], t["S"], t["lora_A"], seeded(0.3), tile=tile)


def test_all_dropped_and_none_dropped():
    t = operands(17, 16, 24, 2, torch.float32)
    bare = gemm_dx(t["dy"], t["weight"], torch.zeros_like(t["S"]), t["lora_A"])
    assert torch.equal(gemm_dx(t["dy"], t["weight"], t["S"], t["lora_A"], bits_of(seeded(1.0), 17, 24)), bare)
    check_dx(t["dy"], t["weight"], t["S"], t["lora_A"], seeded(0.0))


def test_mask_does_not_depend_on_the_tile():
    M, N, K, R = 70, 32, 96, 4
    whole = {n: torch.randint(-3, 4, v.shape).float() for n, v in operands(M, N, K, R, torch.float32).items()}
    args = whole["dy"], whole["weight"], whole["S"], whole["lora_A"], bits_of(seeded(0.5), M, K)
    results = [
        gemm_dx(*args, tile=tile)
        for tile in (None, TMA, Tile(16, 64, 16, 4, 1), Tile(64, 32, 64, 4, 1), Tile(128, 128, 32, 4, 1, group_m=1))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_out_and_repetition_bit_for_bit():
    t = operands(40, 33, 64, 8, torch.float16)
    args = t["x"], t["weight"], t["bias"], t["S"], t["lora_B"]
    out = torch.empty(40, 33, dtype=torch.float16)
    assert gemm_forward(*args, out=out) is out
    assert torch.equal(out, gemm_forward(*args))
    args = t["dy"], t["weight"], t["S"], t["lora_A"], bits_of(seeded(0.3), 40, 64)
    assert torch.equal(gemm_dx(*args), gemm_dx(*args))


@pytest.mark.parametrize("name", ["x", "weight", "S", "lora_B", "dy", "lora_A"])
def test_offsets_past_two_to_the_31(name):
    """Rows 2**27 elements apart: the last of 17 and more starts at 2**31. The pages between are never touched."""
    t = operands(18, 19, 20, 17, torch.float16)
    small = t[name]
    far = torch.empty_strided(small.shape, (1 << 27, 1), dtype=small.dtype)
    far.copy_(small)
    near = dict(t)
    t[name] = far
    if name in ("x", "weight", "S", "lora_B"):
        args = [[d[n] for n in ("x", "weight", "bias", "S", "lora_B")] for d in (t, near)]
        assert torch.equal(gemm_forward(*args[0]), gemm_forward(*args[1]))
    if name in ("dy", "weight", "S", "lora_A"):
        args = [[d[n] for n in ("dy", "weight", "S", "lora_A")] for d in (t, near)]
        assert torch.equal(gemm_dx(*args[0]), gemm_dx(*args[1]))


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (33, 97, 65), (64, 64, 96)])
def test_da_leaves_the_mask_as_bits(M, N, K):
    for dtype, R in zip(DTYPES, (3, 40), strict=True):
        t = operands(M, N, K, R, dtype)
        bits = mask_bits(M, K, t["x"].device).fill_(0xAA)
        dA = da(t["S"], t["x"], seeded(0.3), dtype, bits=bits)
        assert torch.equal(dA, da(t["S"], t["x"], seeded(0.3), dtype))
        for found in (bits, bits_of(seeded(0.3), M, K)):
            kept = ((found[:, :, None] >> torch.arange(8)) & 1).flatten(1)
            assert torch.equal(kept[:, :K].bool(), philox_mask(seeded(0.3).seed, M, K, 0.3))


def test_descriptors_refuse_rows_that_overlap():
    t = operands(8, 32, 64, 2, torch.float16)
    x = torch.zeros(8 * 64, dtype=torch.float16).as_strided((8, 64), (32, 1))
    with pytest.raises(ValueError, match="do not overlap"):
        gemm_forward(x, t["weight"], None, t["S"], t["lora_B"], tile=TMA)
    check_forward(x, t["weight"], None, t["S"], t["lora_B"])


def launch(target, N=4096, x_strides=(4096, 1), w_strides=(4096, 1), start=0, bits=None):
    """Of the forward product on `target`, from tensors without memory."""
    x = torch.empty(1 << 26, dtype=torch.float16, device="meta")[start:].as_strided((8192, 4096), x_strides, start)
    W = torch.empty(1 << 26, dtype=torch.float16, device="meta").as_strided((N, 4096), w_strides)
    s, u, y = (torch.empty(size, dtype=torch.float16, device="meta") for size in ((8192, 16), (16, N), (8192, N)))
    return gemm_launch(target, x, W.t(), None, s, u, bits, y)


def by_n(launch):
    """What either kernel is told of W's rows."""
    return next(launch.args[name] for name in ("BY_N", "W_BY_N") if name in launch.args)


def test_hopper_takes_descriptors_where_rows_are_16_byte_pieces():
    hopper, bits = Target("cuda", 90), mask_bits(8192, 4096, torch.device("meta"))

    def described(target=hopper, **keywords):
        return "x_desc" in launch(target, **keywords).args

    assert described() and described(bits=bits) and launch(hopper).grid == (132,)
    assert by_n(launch(hopper)) and not by_n(launch(hopper, w_strides=(1, 4096)))
    assert described(x_strides=(4104, 1))
    for refused in (
        {"N": 4097}, {"start": 1}, {"x_strides": (1, 8192)}, {"x_strides": (0, 1)}, {"x_strides": (4088, 1)},
        {"w_strides": (4088, 1)}, {"target": Target("cuda", 80)},
    ):  # fmt: skip
        assert not described(**refused), refused
