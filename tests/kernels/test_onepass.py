"""y and S from one kernel against the error rule, and against the S kernel."""

from __future__ import annotations

import pytest
import torch
from judge import DTYPES, LAYOUTS, RANKS, draw, far, judge, paired, strided

from fastlora.kernels.dropout import Dropout
from fastlora.kernels.onepass import onepass_forward
from fastlora.paths.mask import philox_mask

pytestmark = pytest.mark.usefixtures("poisoned")

SEED = 3


def inputs(M, N, K, R, dtype, adapter_dtype=None):
    """x, weight, lora_A, lora_B, bias."""
    adapter = adapter_dtype or dtype
    return [
        draw(M, K, dtype=dtype),
        draw(N, K, dtype=dtype, seed=1),
        draw(R, K, dtype=adapter, seed=2),
        draw(N, R, dtype=adapter, seed=3),
        draw(N, dtype=dtype, seed=4),
    ]


def check(x, weight, lora_A, lora_B, bias, scaling=2.0, p=0.0):
    dropout = Dropout(p, torch.tensor([SEED])) if p else None
    mask = philox_mask(dropout.seed, *x.shape, p) if p else 1

    def down(x, lora_A):
        return scaling * (x * mask) @ lora_A.T

    def whole(x, weight, lora_A, lora_B, bias=0):
        return x @ weight.T + bias + down(x, lora_A) @ lora_B.T

    y, S = onepass_forward(x, weight, bias, lora_A, lora_B, scaling, dropout)
    for out in (y, S):
        assert out.dtype is x.dtype and out.is_contiguous()
    judge(S, down, x, lora_A, dtype=x.dtype)
    judge(y, whole, x, weight, lora_A, lora_B, *(() if bias is None else (bias,)), dtype=x.dtype)
    return y, S


@pytest.mark.parametrize(("R", "dtype", "p"), paired(RANKS, DTYPES, (0.0, 0.25)))
def test_error_rule(dtype, R, p):
    check(*inputs(37, 75, 83, R, dtype), p=p)


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 70, 8), (64, 128, 100), (65, 3, 200)])
def test_ragged_sizes(M, N, K):
    check(*inputs(M, N, K, 2, torch.float32), p=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    *matrices, bias = inputs(37, 70, 50, 4, torch.float16)
    plain = check(*matrices, bias, p=0.25)
    stepped = torch.stack([bias, bias], 1)[:, 0]
    got = check(*(strided(t, layout) for t in matrices), stepped, p=0.25)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_without_bias_with_float32_adapters():
    *tensors, _ = inputs(37, 70, 50, 4, torch.float16, torch.float32)
    first, second = check(*tensors, None, 0.5), check(*tensors, None, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_past_two_to_the_31():
    x, *rest = inputs(3, 20, 24, 2, torch.float16)
    check(far(x), *rest)


@pytest.mark.parametrize("R", [3, 16])
def test_an_infinity_stays_one(R):
    x, weight, lora_A, lora_B, bias = inputs(3, 5, 4, R, torch.float32)
    x[1, 2] = float("inf")
    y, S = onepass_forward(x, weight, bias, lora_A, lora_B, 2.0, None)
    base, update = x @ weight.T + bias, (2.0 * x @ lora_A.T) @ lora_B.T
    assert torch.equal(y.isnan(), (base + update).isnan()) and torch.equal(y.isinf(), (base + update).isinf())
    assert S[1].isinf().all() and S[::2].isfinite().all()
