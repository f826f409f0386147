"""The Triton paths from outside, in the interpreter: calls by them, their self-check, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import accuracy
import pytest
import torch

import fastlora
from fastlora import check
from fastlora.kernels import s
from fastlora.paths import PATHS
from fastlora.paths.problem import Layout, Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_case(monkeypatch):
    """The other files have the others."""
    monkeypatch.setattr(check, "CASES", ((40, 40, 70, 5, 0.25),))
    monkeypatch.setattr(check, "_verdicts", {})


def test_the_self_check():
    assert fastlora.paths("cpu")["split"] == "usable"
    found = fastlora.selfcheck("cpu")
    assert {found[name] for name in ("torch", "hybrid", "onepass", "split")} == {"ok"}


@pytest.mark.parametrize("name", ["hybrid", "split"])
def test_calls(name):
    for dtype, dropout_p in ((torch.float32, 0.3), (torch.float16, 0.0)):
        inputs = accuracy.draw(30, 20, 24, 5, dtype)
        inputs = replace(inputs, x=inputs.x.view(5, 6, 24), dy=inputs.dy.view(5, 6, 20))
        inputs = accuracy.with_mask(inputs, dropout_p, 1, name) if dropout_p else inputs
        got = accuracy.check(fastlora.lora_linear, inputs, path=name)
        torch.manual_seed(1)
        again = accuracy.run(fastlora.lora_linear, inputs, path=name)
        assert all(torch.equal(got[key], again[key]) for key in got)
    rest = inputs.weight, inputs.lora_A, inputs.lora_B
    assert fastlora.lora_linear(torch.zeros(0, 24, dtype=dtype), *rest, path=name).shape == (0, 20)
    assert not fastlora.lora_linear(inputs.x, *rest, path=name)._is_view()


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (torch.float64, "x is torch.float64; the kernels take float16, bfloat16 and float32"),
        (torch.bfloat16, "Triton's interpreter computes bfloat16 products wrongly"),
    ],
)
def test_a_dtype_that_they_do_not_take(dtype, why):
    i = accuracy.draw(4, 4, 4, 2, dtype)
    with pytest.raises(RuntimeError) as refused:
        fastlora.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, path="split")
    assert str(refused.value) == f"path 'split' cannot run here: {why}"


def test_a_kernel_broken_on_purpose_is_found_and_refused(monkeypatch):
    split = PATHS["split"]
    odd = Layout((48, 1), 4, (1, 24), 0)  # x unaligned and with a pitch, the weight transposed
    kinds = torch.float32, torch.float32, CPU, True
    trials = [check.Trial(Problem(40, 24, 32, 4, *kinds, layout)) for layout in (None, odd)]
    assert [trial.fault(split) for trial in trials] == [None, None]
    honest = s.s_forward
    monkeypatch.setattr(s, "s_forward", lambda x, A, scaling, *rest: honest(x, A, scaling * 1.01, *rest))
    found = check.examine(split, CPU)
    assert "error" in found and "over the limit" in found
    assert all("over the limit" in trial.fault(split) for trial in trials), "a trial that finds nothing"
    monkeypatch.setattr(check, "needs_check", lambda path, device: path.name != "torch")
    monkeypatch.setattr("fastlora.errors._said", set())
    with pytest.warns(UserWarning, match="failed its self-check"), pytest.raises(RuntimeError) as refused:
        fastlora.lora_linear(*[torch.ones(8, 8)] * 4, path="split")
    assert str(refused.value).startswith("path 'split' cannot run here") and found in str(refused.value)
