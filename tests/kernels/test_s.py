"""S = scaling * drop(x) Aᵀ against the error rule."""

from __future__ import annotations

import pytest
import torch
from judge import DTYPES, LAYOUTS, RANKS, draw, far, judge, paired, strided

from fastlora.kernels.dropout import Dropout
from fastlora.kernels.s import s_forward
from fastlora.paths.mask import philox_mask

pytestmark = pytest.mark.usefixtures("poisoned")

SEED = 2**33 + 5


def check(x, lora_A, scaling=2.0, p=0.0):
    dropout = Dropout(p, torch.tensor([SEED])) if p else None
    mask = philox_mask(dropout.seed, *x.shape, p) if p else 1
    S = s_forward(x, lora_A, scaling, dropout)
    assert S.dtype is x.dtype and S.is_contiguous()
    judge(S, lambda x, A: scaling * (x * mask) @ A.T, x, lora_A, dtype=x.dtype)
    return S


@pytest.mark.parametrize(("R", "dtype", "p"), paired(RANKS, DTYPES, (0.0, 0.25)))
def test_error_rule(dtype, R, p):
    check(draw(45, 83, dtype=dtype), draw(R, 83, dtype=dtype, seed=1), p=p)


@pytest.mark.parametrize("M, K", [(1, 1), (1, 500), (33, 8), (70, 64), (17, 330)])
def test_ragged_sizes_and_splits_of_k(M, K):
    check(draw(M, K, dtype=torch.float32), draw(5, K, dtype=torch.float32, seed=1), p=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, lora_A = draw(37, 70, dtype=torch.float16), draw(4, 70, dtype=torch.float16, seed=1)
    plain = check(x, lora_A, p=0.25)
    assert torch.equal(check(strided(x, layout), strided(lora_A, layout), p=0.25), plain)


def test_float32_adapter():
    check(draw(37, 70, dtype=torch.float16), draw(4, 70, dtype=torch.float32, seed=1), 0.75)


def test_repeats_bit_for_bit():
    x, lora_A = draw(20, 700, dtype=torch.float32), draw(8, 700, dtype=torch.float32, seed=1)
    assert torch.equal(check(x, lora_A, p=0.25), check(x, lora_A, p=0.25))


def test_offsets_past_two_to_the_31():
    x = far(draw(3, 40, dtype=torch.float16))
    check(x, draw(2, 40, dtype=torch.float16, seed=1))
    check(x.t(), draw(2, 3, dtype=torch.float16, seed=1))


def test_everything_dropped_is_zero():
    x, lora_A = draw(9, 20, dtype=torch.float32), draw(3, 20, dtype=torch.float32)
    assert not s_forward(x, lora_A, 1.0, Dropout(1.0, torch.tensor([SEED]))).any()
