"""Projections that share x, and banks of adapters, by every path on a real GPU. Skipped without one."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import accuracy
import pytest
import torch

import fastlora
from fastlora import autograd, choice
from fastlora.accuracy import shared_violations
from fastlora.node import NODE
from fastlora.paths import PATHS
from fastlora.paths.bank import Bank
from fastlora.paths.problem import Problem, draw_seed, draw_seeds
from fastlora.paths.shared import SHARED

HOLLOW = torch.cuda.is_available() and hasattr(ctypes.CDLL("libcuda.so.1"), "hollow_launches")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or HOLLOW, reason="needs a GPU that computes")
DEVICE = torch.device("cuda")
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(FLOAT, FLOAT), (HALF, HALF), (BRAIN, BRAIN), (BRAIN, FLOAT)]
SHAPES = {  # M, K and (N, R) of each
    "ragged": (37, 41, ((53, 3), (41, 8), (72, 16))),
    "qkv": (960, 768, ((768, 16),) * 3),
    "grouped heads": (300, 256, ((256, 8), (64, 8), (64, 8))),
    "gate and up": (1, 512, ((1024, 64), (1024, 33))),
}


@pytest.fixture(params=[name for name in PATHS if name != "cpu"])
def path(request):
    reason = PATHS[request.param].why_not(DEVICE, None)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def skip_unless_taken(path, M, K, each, dtype, adapter, p, bank=False):
    for N, R in each:
        reason = PATHS[path].why_not(DEVICE, Problem(M, N, K, R, dtype, adapter, DEVICE, p > 0.0, bank=bank))
        if reason:
            pytest.skip(reason)


def draw(path, shape, dtype, adapter, p):
    M, K, each = SHAPES[shape]
    skip_unless_taken(path, M, K, each, dtype, adapter, p)
    many = [
        accuracy.draw(M, N, K, R, dtype, adapter_dtype=adapter, bias=i != 1, scaling=1.0 + i, seed=i, device=DEVICE)
        for i, (N, R) in enumerate(each)
    ]
    many = [replace(one, x=many[0].x, dropout_p=p) for one in many]
    if p:
        torch.manual_seed(0)
        apart = path not in SHARED or (path == "torch" and NODE is not None)
        seeds = [draw_seed(DEVICE) for _ in many] if apart else draw_seeds(DEVICE, len(many))
        many = [replace(one, mask=PATHS[path].mask(seed, M, K, p)) for one, seed in zip(many, seeds, strict=True)]
    torch.manual_seed(0)
    return many


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projections_obey_the_rule(path, shape, dtype, adapter, p, monkeypatch):
    monkeypatch.setenv("FASTLORA_PATH", path)
    assert not shared_violations(fastlora.lora_linears, draw(path, shape, dtype, adapter, p))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", ["ragged", "qkv"])
def test_what_is_recorded_gives_the_same_bits(path, shape, p, monkeypatch):
    """The first call goes through Python, the third is launched from C++."""
    many = draw(path, shape, BRAIN, BRAIN, p)
    monkeypatch.setattr(choice, "choose", lambda problem: choice.Choice(PATHS[path], ""))
    choice.forget()
    x = many[0].x.clone().requires_grad_()
    adapters = [[t.clone().requires_grad_() for t in (one.lora_A, one.lora_B)] for one in many]
    each = [(one.weight, *own, one.bias, one.scaling) for one, own in zip(many, adapters, strict=True)]
    leaves = [x, *(t for own in adapters for t in own)]

    def step():
        torch.manual_seed(3)
        ys = fastlora.lora_linears(x, each, p)
        return [y.detach() for y in ys], torch.autograd.grad(ys, leaves, [one.dy for one in many])

    first = step()
    for again in (step(), step(), step()):
        assert all(
            torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True)
        )
    choice.forget()


@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), (0.1, 0.0, 0.5)], ids=["whole", "dropout"])
@pytest.mark.parametrize("owners", [[0, 0, 1, 1, 2, None], [2, 1, 0, None, 2, 1, 0], [2, None, 0]], ids=str)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_each_adapter_is_as_if_alone(path, owners, ps, dtype, adapter):
    each, N, K, ranks = 37, 104, 72, (3, 8, 1)
    skip_unless_taken(path, each * len(owners), K, [(N, sum(ranks))], dtype, adapter, max(ps), bank=True)
    bank = Bank.of(ranks, (2.0, 0.5, -1.3), ps, owners, each, DEVICE)
    inputs = accuracy.draw(len(owners) * each, N, K, bank.R, dtype, adapter_dtype=adapter, device=DEVICE)
    inputs = replace(inputs, scaling=1.0, dropout_p=max(ps), bank=bank)
    if bank.drops:
        torch.manual_seed(1)
        inputs = replace(inputs, mask=PATHS[path].mask(draw_seed(DEVICE), *inputs.x.shape, bank))

    def call(x, weight, lora_A, lora_B, bias, scaling, p, bank):
        return autograd.run(PATHS[path], x, weight, lora_A, lora_B, bias, scaling, p, bank)

    def found():
        torch.manual_seed(1)
        return accuracy.run(call, inputs)

    first = found()
    assert not accuracy.violations(first, inputs)
    for again in (found(), found()):
        assert all(torch.equal(first[name], again[name]) for name in first)
