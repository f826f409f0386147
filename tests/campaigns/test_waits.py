"""No step waits for a GPU: `waits` and `sync` in their quick form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from campaigns import sync, waits
from fastlora.paths import PATHS


@pytest.mark.parametrize("name", waits.PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_step_waits_for_a_gpu(name, dropout_p):
    case = (64, 96, 128, 8, torch.float16, torch.float32, dropout_p)
    found, launched = waits.waits(PATHS[name], case, (9, 0))
    assert not found
    assert bool(launched) == (name != "torch" or dropout_p > 0.0)  # path `torch` has its mask of a kernel


def test_a_step_that_waits_for_a_gpu_is_found():
    case, honest = (64, 96, 128, 8, torch.float16, torch.float16, 0.0), PATHS["torch"]
    for asks, what in (
        (lambda y: y.sum().item(), "DataDependentOutputException"),
        (lambda y: y.cpu(), "aten._to_copy"),
        (lambda y: bool((y > 0).all()), "DataDependentOutputException"),
    ):
        path = SimpleNamespace(forward=lambda *a, asks=asks: (asks(honest.forward(*a)[0]), None))
        found, _ = waits.waits(path, case, (9, 0))
        assert found and what in found[0]


def test_the_hollow_gpu_compiles(tmp_path):
    reason = sync.compiler_missing()
    if reason:
        pytest.skip(reason)
    symbols = sync.build(tmp_path).read_bytes()
    assert all(name in symbols for name in (b"cudaStreamSynchronize", b"cuLaunchKernelEx", b"hollow_waits"))


def test_the_hollow_gpu_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr("torch.version.cuda", None)
    assert sync.main([]) == sync.CANNOT_RUN
    assert capsys.readouterr().out.endswith("it stands in for CUDA 13, and this torch was built for no CUDA\n")
