"""A bank on the GPU's paths: each adapter against the reference on its own rows alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastlora import accuracy, autograd
from fastlora.kernels.dropout import Dropout, keep_mask
from fastlora.paths import PATHS
from fastlora.paths.bank import Bank
from fastlora.paths.gpu import launches
from fastlora.paths.mask import philox_mask
from fastlora.paths.problem import Problem, Update, draw_seed

pytestmark = pytest.mark.usefixtures("poisoned")

CPU, GPU_PATHS = torch.device("cpu"), ("hybrid", "onepass", "split")
RANKS, SCALINGS, PS = (1, 5, 8), (2.0, 0.5, -1.5), (0.0, 0.5, 0.1)
NOTHING = (0.0, 0.0, 0.0)


def owners(M: int, order: str) -> list[int | None]:
    """The adapter of each row, by quarters or by chance; None for some."""
    if order == "groups":
        return [None if 4 * m // M == 3 else 4 * m // M for m in range(M)]
    drawn = torch.randint(0, 4, (M,), generator=torch.Generator().manual_seed(M)).tolist()
    return [None if i == 3 else i for i in drawn]


def function(path):
    def call(x, weight, lora_A, lora_B, bias, scaling, p, bank):
        return autograd.run(PATHS[path], x, weight, lora_A, lora_B, bias, scaling, p, bank)

    return call


def case(path, M, N, K, ps=PS, ranks=RANKS, order="chance", dtype=torch.float32, adapter_dtype=None, bias=True):
    bank = Bank.of(ranks, SCALINGS, ps, owners(M, order), 1, CPU)
    inputs = accuracy.draw(M, N, K, sum(ranks), dtype, adapter_dtype=adapter_dtype, bias=bias, scaling=1.0)
    inputs = replace(inputs, bank=bank, dropout_p=max(ps))
    if bank.drops:
        torch.manual_seed(3)
        inputs = replace(inputs, mask=PATHS[path].mask(draw_seed(CPU), M, K, bank))
    torch.manual_seed(3)  # so that the call draws what the mask was made of
    return inputs


def check(path, *sizes, **keywords):
    inputs = case(path, *sizes, **keywords)
    got = accuracy.run(function(path), inputs)
    found = accuracy.violations(got, inputs)
    assert not found, "; ".join(found)
    return got


@pytest.mark.parametrize("path", GPU_PATHS)
@pytest.mark.parametrize("dtype, order, ps", [(torch.float32, "chance", PS), (torch.float16, "groups", NOTHING)])
def test_each_adapter_is_as_if_alone(path, dtype, order, ps):
    first, second = (check(path, 45, 50, 83, order=order, ps=ps, dtype=dtype) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("path", GPU_PATHS)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 70, 33), (130, 3, 65), (17, 20, 330), (64, 64, 64)])
def test_ragged_sizes_and_splits(path, M, N, K):
    check(path, M, N, K)


@pytest.mark.parametrize("path", GPU_PATHS)
@pytest.mark.parametrize("ranks", [(1, 1, 1), (16, 20, 9), (33, 64, 31), (120, 3, 130)], ids=sum)
def test_ranks(path, ranks):
    check(path, 45, 50, 83, ranks=ranks)


@pytest.mark.parametrize("path", GPU_PATHS)
def test_one_adapter_of_rank_one(path):
    bank = Bank.of((1,), (2.0,), (0.25,), [0, None, 0] * 7, 1, CPU)
    inputs = replace(case(path, 21, 30, 40, ranks=(1, 0, 0)), bank=bank, dropout_p=0.25)
    inputs = replace(inputs, mask=PATHS[path].mask(draw_seed(CPU), 21, 40, bank))
    torch.manual_seed(3)
    assert not accuracy.violations(accuracy.run(function(path), inputs), inputs)


@pytest.mark.parametrize("path", GPU_PATHS)
def test_float32_adapters_over_float16_and_no_bias(path):
    check(path, 50, 45, 60, dtype=torch.float16, adapter_dtype=torch.float32, bias=False)


@pytest.mark.parametrize("path", GPU_PATHS)
def test_another_factor_and_another_mask_are_noticed(path):
    inputs = case(path, 60, 40, 50)
    wrong = (
        replace(inputs.bank, scalings=(2.0, 0.51, -1.5)),
        replace(inputs.bank, ps=(0.0, 0.5, 0.11)),
    )
    for bank, adapter in zip(wrong, (1, 2), strict=True):
        torch.manual_seed(3)
        found = accuracy.violations(accuracy.run(function(path), replace(inputs, bank=bank)), inputs)
        assert found and all(what.startswith(f"adapter {adapter}") for what in found)


@pytest.mark.parametrize("path", GPU_PATHS)
@pytest.mark.parametrize("ps", [PS, NOTHING], ids=["dropout", "whole"])
def test_nan_in_the_rows_of_one_adapter_stays_in_them(path, ps):
    inputs = case(path, 50, 40, 140, ps=ps)
    clean = accuracy.run(function(path), inputs)
    x, others = inputs.x.clone(), inputs.bank.rows != 1
    x[~others] = math.nan
    torch.manual_seed(3)
    got = accuracy.run(function(path), replace(inputs, x=x))
    for name in ("Y", "dX"):
        assert torch.equal(got[name][others], clean[name][others])
    assert got["Y"][~others].isnan().all()


@pytest.mark.parametrize("path", GPU_PATHS)
def test_what_an_adapter_that_diverged_makes_of_others_rows_is_not_kept_in_s(path):
    inputs = case(path, 50, 40, 140)
    update_A = inputs.lora_A.clone()
    update_A[0] = math.inf
    got = accuracy.run(function(path), replace(inputs, lora_A=update_A))
    assert got["Y"][inputs.bank.rows != 0].isfinite().all()


@pytest.mark.parametrize("path", GPU_PATHS)
@pytest.mark.parametrize("several", [True, False])
def test_dx_is_the_same_where_da_is_not_wanted(path, several):
    inputs = case(path, 40, 40, 70)
    x, weight, A, B, dy = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.dy
    update = Update(A, B, 1.0, 0.5, torch.tensor(5), inputs.bank if several else None)
    _, S = PATHS[path].forward(x, weight, None, update)
    dx, dA, _ = PATHS[path].backward(dy, x, weight, S, update, True)
    alone, nothing, _ = PATHS[path].backward(dy, None, weight, S, update, True)
    assert torch.equal(alone, dx) and dA is not None and nothing is None


@pytest.mark.parametrize("ps", [PS, (1.0, 1e-6, 65535 / 65536)])
def test_the_mask_of_each_row_is_its_adapters(ps):
    M, K, seed = 61, 150, torch.tensor(-0x1234_5678_9ABC_DEF0)
    bank = Bank.of(RANKS, SCALINGS, ps, owners(M, "chance"), 1, CPU)
    found = keep_mask(Dropout(bank, seed), M, K)
    for i, p in enumerate((*ps, 0.0)):
        assert torch.equal(found[bank.rows == i], keep_mask(Dropout(p, seed), M, K)[bank.rows == i])
    assert torch.equal(found, philox_mask(seed, M, K, bank))


def test_more_ranks_than_a_bank_may_have_are_refused():
    def why_not(R, bank):
        half = torch.float16
        return PATHS["hybrid"].why_not(CPU, Problem(60, 40, 50, R, half, half, CPU, True, bank=bank))

    assert why_not(128, False) is None and why_not(256, True) is None
    assert why_not(129, False) == "R is 129; the kernels take at most 128"
    assert why_not(257, True) == "R is 257; the kernels take at most 256"


@pytest.mark.parametrize("path", GPU_PATHS)
def test_launches_are_planned_as_they_are_made(path, monkeypatch):
    from fastlora.record import recording

    inputs = case(path, 60, 40, 50)
    problem = Problem(60, 40, 50, sum(RANKS), torch.float32, torch.float32, CPU, True, bank=True)
    planned = [launch.label for launch in launches(PATHS[path], problem)]
    with recording() as made:
        accuracy.run(function(path), inputs)
        accuracy.run(function(path), replace(inputs, bias=None))
    assert {launch.label for launch, _ in made} == set(planned)
    assert any("dropout/bank" in label for label in planned)
