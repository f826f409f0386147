"""dS with dB, and dA, against the error rule."""

from __future__ import annotations

import pytest
import torch
from judge import DTYPES, LAYOUTS, RANKS, draw, far, judge, paired, strided

import fastlora
from fastlora.kernels import grads
from fastlora.kernels.dropout import Dropout, keep_mask
from fastlora.kernels.s import s_forward
from fastlora.paths.mask import philox_mask

pytestmark = pytest.mark.usefixtures("poisoned")

SEED = 77


def check_ds_db(dy, lora_B, S, scaling=2.0):
    dS, dB = grads.ds_db(dy, lora_B, S, scaling)
    assert dS.dtype is dy.dtype and dB.dtype is lora_B.dtype
    assert dS.is_contiguous() and dB.is_contiguous()
    judge(dS, lambda dy, B: scaling * dy @ B, dy, lora_B, dtype=dy.dtype)
    judge(dB, lambda dy, S: dy.T @ S, dy, S, dtype=dy.dtype)
    return dS, dB


def check_da(dS, x, p=0.0, dtype=None):
    dropout = Dropout(p, torch.tensor([SEED])) if p else None
    mask = philox_mask(dropout.seed, *x.shape, p) if p else 1
    dA = grads.da(dS, x, dropout, dtype or x.dtype)
    assert dA.dtype is (dtype or x.dtype) and dA.is_contiguous()
    judge(dA, lambda dS, x: dS.T @ (x * mask), dS, x, dtype=x.dtype)
    return dA


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ds_db_error_rule(dtype, R):
    check_ds_db(draw(75, 101, dtype=dtype), draw(101, R, dtype=dtype, seed=1), draw(75, R, dtype=dtype, seed=2))


@pytest.mark.parametrize(("R", "dtype", "p"), paired(RANKS, DTYPES, (0.0, 0.25)))
def test_da_error_rule(dtype, R, p):
    check_da(draw(75, R, dtype=dtype), draw(75, 101, dtype=dtype, seed=1), p)


@pytest.mark.parametrize("M, N", [(1, 1), (1, 200), (200, 1), (64, 64), (33, 65), (270, 20), (20, 270)])
@pytest.mark.parametrize("R", [2, 64])
def test_ragged_sizes_regions_and_splits(M, N, R):
    dy, S = draw(M, N, dtype=torch.float32), draw(M, R, dtype=torch.float32, seed=2)
    check_ds_db(dy, draw(N, R, dtype=torch.float32, seed=1), S)
    check_da(S, dy, 0.5)


@pytest.mark.parametrize("R", [3, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, R):
    dy, B, S = (draw(*s, dtype=torch.float16, seed=i) for i, s in enumerate([(70, 90), (90, R), (70, R)]))
    plain = check_ds_db(dy, B, S)
    for got, expected in zip(check_ds_db(strided(dy, layout), strided(B, layout), S), plain, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(check_da(strided(S, layout), strided(dy, layout), 0.25), check_da(S, dy, 0.25))


@pytest.mark.parametrize("R", [3, 64])
def test_float32_adapters(R):
    dy, S = draw(40, 50, dtype=torch.float16), draw(40, R, dtype=torch.float16, seed=2)
    check_ds_db(dy, draw(50, R, dtype=torch.float32, seed=1), S, 0.5)
    check_da(S, dy, 0.25, torch.float32)


@pytest.mark.parametrize("R", [16, 64])
def test_repeats_bit_for_bit(R):
    dy, B, S = (draw(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(130, 130), (130, R), (130, R)]))
    first, second = ((*check_ds_db(dy, B, S), check_da(S, dy, 0.25)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_forward_and_backward_drop_the_same():
    """With one-hot rows, S and dA show the mask itself: column m of S is row m of keep * x, and so is dA's."""
    n = 48
    x, eye = draw(n, n, dtype=torch.float32).abs() + 1, torch.eye(n)
    dropout = Dropout(0.5, torch.tensor([SEED]))
    mask = keep_mask(dropout, n, n)
    assert torch.equal(s_forward(x, eye, 1.0, dropout) != 0, mask)
    assert torch.equal(grads.da(eye, x, dropout, torch.float32) != 0, mask)


def test_offsets_past_two_to_the_31():
    dy = far(draw(3, 40, dtype=torch.float16))
    S = draw(3, 2, dtype=torch.float16, seed=1)
    check_ds_db(dy, draw(40, 2, dtype=torch.float16, seed=2), S)
    check_da(S, dy)
    check_da(draw(40, 2, dtype=torch.float16, seed=2), dy.t())


@pytest.mark.parametrize("path", ["split", "onepass"])
@pytest.mark.parametrize(("pack", "what"), [(torch.Tensor.half, "S"), (lambda t: t[:1] if t.dim() else t, "S"),
                                            (lambda t: t if t.dim() else t.int(), "the dropout seed")])  # fmt: skip
def test_what_hooks_of_saved_tensors_have_changed_is_refused(path, pack, what):
    x, W, A, B = torch.randn(20, 24), torch.randn(16, 24), torch.randn(4, 24, requires_grad=True), torch.randn(16, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, pack):
        y = fastlora.lora_linear(x, W, A, B, dropout_p=0.5, path=path)
        with pytest.raises(RuntimeError, match=f"^{what} came back from saved-tensor hooks as"):
            y.sum().backward()
