"""Broken kernels of ours are noticed, all of them: each mutation of `mutants.py` in each kernel with a place for it."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels.tiles import Target

from .cases import Case, quick
from .mutants import dies, everywhere, original, without_swizzle

TARGETS = [Target("cuda", arch) for arch in (80, 90)]
CASES = [case for target in TARGETS for case in [case for case in quick(target) if not case.several][::2]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mutant_dies(case: Case):
    torch.set_num_threads(1)
    text, parameters = original(case)
    survive = [name for name, mutant in everywhere(text, parameters) if dies(case, text, mutant) is None]
    if case.tile.tma and without_swizzle(case) is None:
        survive.append("tensor map without its swizzle")
    assert not survive
