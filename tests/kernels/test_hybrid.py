"""What path hybrid writes before ATen's GEMM adds to it, against the error rule and against the other kernels."""

from __future__ import annotations

import math

import pytest
import torch
from judge import DTYPES, LAYOUTS, RANKS, draw, judge, strided

from fastlora.kernels import hybrid
from fastlora.kernels.dropout import Dropout, keep_mask
from fastlora.kernels.grads import da
from fastlora.kernels.s import s_forward

pytestmark = pytest.mark.usefixtures("poisoned")

SEED = 2**40 + 11


def seeded(p):
    return Dropout(p, torch.tensor([SEED])) if p else None


def check_s_y(x, lora_A, lora_B, bias, scaling=2.0, p=0.0, tile=None):
    M, N = x.shape[0], lora_B.shape[0]
    mask = keep_mask(seeded(p), *x.shape) if p else 1
    around = torch.full((M, N + 7), math.nan, dtype=x.dtype)  # `out` may be a part of something wider
    y = around[:, 3 : 3 + N]
    S = hybrid.s_y(x, lora_A, lora_B, bias, scaling, seeded(p), y, tile)
    assert S.dtype is x.dtype and S.is_contiguous()
    assert around[:, :3].isnan().all() and around[:, 3 + N :].isnan().all()
    judge(S, lambda x, A: scaling * (x * mask) @ A.T, x, lora_A, dtype=x.dtype)
    judge(y, lambda S, B, bias=0: S @ B.T + bias, S, lora_B, *(() if bias is None else (bias,)), dtype=x.dtype)
    return S, y.clone()


def check_da_dx(dS, x, lora_A, p=0.0, want_dA=True, want_dx=True):
    mask = keep_mask(seeded(p), dS.shape[0], lora_A.shape[1]) if p else 1
    dx = torch.empty(dS.shape[0], lora_A.shape[1], dtype=dS.dtype) if want_dx else None
    dA = hybrid.da_dx(dS, x, lora_A, seeded(p), lora_A.dtype if want_dA else None, dx)
    assert (dA is None) is (not want_dA)
    if want_dA:
        assert dA.dtype is lora_A.dtype and dA.is_contiguous()
        judge(dA, lambda dS, x: dS.T @ (x * mask), dS, x, dtype=x.dtype)
    if want_dx:
        judge(dx, lambda dS, A: (dS @ A) * mask, dS, lora_A, dtype=dS.dtype)
    return dA, dx


def forward(M, N, K, R, dtype, adapter_dtype=None):
    """x, lora_A, lora_B, bias."""
    sizes = [(M, K), (R, K), (N, R), (N,)]
    dtypes = [dtype, adapter_dtype or dtype, adapter_dtype or dtype, dtype]
    return [draw(*size, dtype=d, seed=i) for i, (size, d) in enumerate(zip(sizes, dtypes, strict=True))]


def backward(M, K, R, dtype, adapter_dtype=None):
    """dS, x, lora_A."""
    return [
        draw(M, R, dtype=dtype),
        draw(M, K, dtype=dtype, seed=1),
        draw(R, K, dtype=adapter_dtype or dtype, seed=2),
    ]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype, R, p):
    check_s_y(*forward(45, 75, 83, R, dtype), p=p)
    check_da_dx(*backward(75, 101, R, dtype), p=p)


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 70, 500), (65, 3, 40), (33, 64, 8), (160, 200, 63), (17, 9, 1030)])
@pytest.mark.parametrize("R", [3, 40])
def test_ragged_sizes_and_splits(M, N, K, R):
    check_s_y(*forward(M, N, K, R, torch.float32), p=0.5)
    check_da_dx(*backward(M, K, R, torch.float32), p=0.5)


@pytest.mark.parametrize("R", [5, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, R):
    *matrices, bias = forward(37, 70, 50, R, torch.float16)
    plain = check_s_y(*matrices, bias, p=0.25)
    got = check_s_y(*(strided(t, layout) for t in matrices), torch.stack([bias, bias], 1)[:, 0], p=0.25)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    matrices = backward(70, 90, R, torch.float16)
    plain = check_da_dx(*matrices, p=0.25)
    got = check_da_dx(*(strided(t, layout) for t in matrices), p=0.25)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("R", [5, 40])
def test_float32_adapters_and_no_bias(R):
    x, A, B, _ = forward(40, 50, 60, R, torch.float16, torch.float32)
    check_s_y(x, A, B, None, 0.5)
    check_da_dx(*backward(70, 50, R, torch.float16, torch.float32), p=0.25)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("R", [5, 40])
def test_what_is_not_wanted_is_not_made(R, p):
    dS, x, A = backward(150, 90, R, torch.float32)
    dA, dx = check_da_dx(dS, x, A, p)
    assert torch.equal(check_da_dx(dS, x, A, p, want_dx=False)[0], da(dS, x, seeded(p), A.dtype))
    assert torch.equal(check_da_dx(dS, None, A, p, want_dA=False)[1], dx)
    assert check_da_dx(dS, None, A, p, want_dA=False, want_dx=False) == (None, None)
    assert torch.equal(check_da_dx(dS, x, A, p)[0], dA)  # bitwise repeatable


def test_s_is_that_of_the_s_kernel_and_repeats_bit_for_bit():
    for M, K in ((20, 700), (200, 60)):  # K split, and not
        x, A, B, bias = forward(M, 50, K, 8, torch.float32)
        S, y = check_s_y(x, A, B, bias, p=0.25)
        assert torch.equal(S, s_forward(x, A, 2.0, seeded(0.25)))
        assert torch.equal(check_s_y(x, A, B, bias, p=0.25)[1], y)


def test_a_new_layer_adds_nothing_to_the_bias():
    x, A, B, bias = forward(33, 50, 60, 4, torch.float16)
    _, y = check_s_y(x, A, torch.zeros_like(B), bias)
    assert torch.equal(y, bias.expand(33, 50))


def test_an_infinity_stays_in_its_row():
    x, A, B, _ = forward(3, 5, 40, 3, torch.float32)
    x[1, 2] = float("inf")
    y = torch.empty(3, 5)
    S = hybrid.s_y(x, A, B, None, 2.0, None, y)
    assert S[1].isinf().all() and S[::2].isfinite().all() and y[::2].isfinite().all() and not y[1].isfinite().any()


def test_offsets_past_two_to_the_31():
    stride = 2**30 + 24
    x, A, B, bias = forward(3, 20, 24, 2, torch.float16)
    far = torch.empty(3 * stride, dtype=torch.float16).as_strided((3, 24), (stride, 1))  # pages are mapped when touched
    dS, near = draw(3, 2, dtype=torch.float16), torch.empty(3, 24, dtype=torch.float16)
    assert torch.equal(hybrid.da_dx(dS, x, A, None, A.dtype, far), hybrid.da_dx(dS, x, A, None, A.dtype, near))
    assert torch.equal(far, near)
    check_s_y(far.copy_(x), A, B, bias)
