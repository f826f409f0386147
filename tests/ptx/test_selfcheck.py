"""The self-check, whole: what a GPU would run before it trusts a path, with its compiled kernels in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastlora import autograd, check, check_shared
from fastlora.kernels import tiles
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem
from fastlora.paths.shared import SHARED, Needs

from .gpu import Emulator

CPU, HALF, BRAIN, FLOAT = torch.device("cpu"), torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def on_gpu(monkeypatch):
    """Code that asks which GPU a tensor is on is told of the one that is emulated."""

    def emulated(arch: int) -> Emulator:
        monkeypatch.setattr(tiles, "target_of", lambda device: tiles.Target("cuda", arch))
        return Emulator(arch)

    return emulated


@pytest.mark.parametrize("path", ["hybrid", "split", "onepass"])
@pytest.mark.parametrize(
    ("arch", "dtype", "adapter", "dropout", "bank"),
    [(75, HALF, HALF, True, 0), (80, BRAIN, FLOAT, True, 0), (90, BRAIN, BRAIN, True, 0), (90, FLOAT, FLOAT, True, 1)],
)
def test_one(on_gpu, path, arch, dtype, adapter, dropout, bank):
    problem = Problem(70, 48, 72, 8, dtype, adapter, CPU, dropout, bank=bank)
    with on_gpu(arch):
        assert check.Trial(problem)._fault(PATHS[path]) is None


@pytest.mark.parametrize("path", ["hybrid", "split"])  # `onepass` is as `split`
@pytest.mark.parametrize(("arch", "dtype"), [(75, HALF), (90, BRAIN), (90, FLOAT)])
def test_several_that_share_x(on_gpu, path, arch, dtype, monkeypatch):
    problems = [Problem(70, N, 72, R, dtype, dtype, CPU, True) for N, R in ((48, 8), (32, 4), (32, 16))]
    for module in (autograd, check_shared):  # as on a GPU, all in one draw
        monkeypatch.setattr(module, "draw_seeds", lambda _, n: list(torch.randint(2**63 - 1, (n, 2))[:, 0]))
    with on_gpu(arch):
        needs = Needs(True, (True,) * 3, (True,) * 3)
        assert check_shared._fault(PATHS[path], SHARED[path], problems, needs) is None
