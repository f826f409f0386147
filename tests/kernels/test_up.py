"""What path hybrid writes before ATen's GEMM adds to it, against the error rule."""

from __future__ import annotations

import math

import pytest
import torch
from judge import DTYPES, LAYOUTS, RANKS, draw, far, judge, paired, strided

from fastlora.kernels.dropout import Dropout, mask_bits, mask_launch
from fastlora.kernels.up import up
from fastlora.paths.mask import philox_mask

pytestmark = pytest.mark.usefixtures("poisoned")


def operands(M, N, R, dtype, adapter_dtype=None):
    """s, u, bias."""
    return draw(M, R, dtype=dtype), draw(R, N, dtype=adapter_dtype or dtype, seed=1), draw(1, N, dtype=dtype, seed=2)[0]


def check(s, u, bias=None, p=0.0):
    M, N = s.shape[0], u.shape[1]
    keep, bits = 1, None
    if p:
        dropout, bits = Dropout(p, torch.tensor([2**40 + 11])), mask_bits(M, N, s.device)
        mask_launch(dropout, bits).run()
        keep = philox_mask(dropout.seed, M, N, p)
    around = torch.full((M, N + 7), math.nan, dtype=s.dtype)  # `out` may be a part of something wider
    out = around[:, 3 : 3 + N]
    assert up(s, u, bias, bits, out) is out
    assert around[:, :3].isnan().all() and around[:, 3 + N :].isnan().all()
    judge(out, lambda s, u, bias=0: keep * (s @ u) + bias, s, u, *(() if bias is None else (bias,)), dtype=s.dtype)
    return out.clone()


@pytest.mark.parametrize(("R", "dtype", "p"), paired((*RANKS, 200), DTYPES, (0.0, 0.25)))
def test_error_rule(dtype, R, p):
    check(*operands(45, 75, R, dtype), p=p)
    check(*operands(45, 75, R, dtype)[:2], p=p)


@pytest.mark.parametrize("M, N", [(1, 1), (1, 70), (65, 3), (33, 64), (160, 200), (17, 9)])
@pytest.mark.parametrize("R", [3, 40])
def test_ragged_sizes(M, N, R):
    check(*operands(M, N, R, torch.float32), p=0.5)


@pytest.mark.parametrize("R", [5, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, R):
    s, u, bias = operands(37, 70, R, torch.float16)
    plain = check(s, u, bias, p=0.25)
    assert torch.equal(check(strided(s, layout), strided(u, layout), torch.stack([bias, bias], 1)[:, 0], p=0.25), plain)


@pytest.mark.parametrize("R", [5, 40])
def test_float32_adapters(R):
    check(*operands(70, 50, R, torch.float16, torch.float32), p=0.25)


def test_a_new_layer_adds_nothing_to_the_bias():
    s, u, bias = operands(33, 50, 4, torch.float16)
    assert torch.equal(check(s, torch.zeros_like(u), bias), bias.expand(33, 50))


def test_an_infinity_stays_in_its_row():
    s, u, _ = operands(3, 5, 3, torch.float32)
    s[1] = math.inf
    out = up(s, u, None, None, torch.empty(3, 5))
    assert out[::2].isfinite().all() and not out[1].isfinite().any()


def test_offsets_past_two_to_the_31():
    s, u, bias = operands(3, 24, 2, torch.float16)
    out = torch.empty(3, 24, dtype=torch.float16)
    assert torch.equal(up(s, u, bias, None, far(out)), up(s, u, bias, None, out))
