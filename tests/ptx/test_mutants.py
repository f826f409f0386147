"""Broken kernels of ours are noticed, all of them: each mutation of `mutants.py` in each kernel with a place for it.

Forward and dX are one kernel. What `quick` has more of a kernel: `python -m tests.ptx.mutants`.
"""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels.tiles import Target

from .cases import Case, quick
from .mutants import dies, everywhere, original, without_swizzle

# two read a seed in their loops, which the compiler copies ahead under a guard that it does not need
SEEDS = ("s_shared", "da_dx_shared")
QUICK = [c for arch in (80, 90) for c in quick(Target("cuda", arch)) if not c.several and c.kernel not in SEEDS]
KERNELS = {(c.target, c.kernel.removesuffix("_dx"), c.tile.tma, c.tile.ws): c for c in reversed(QUICK)}


@pytest.mark.parametrize("case", KERNELS.values(), ids=str)
def test_every_mutant_dies(case: Case):
    torch.set_num_threads(1)
    text, parameters = original(case)
    survive = [name for name, mutant in everywhere(text, parameters) if dies(case, text, mutant) is None]
    if case.tile.tma and without_swizzle(case) is None:
        survive.append("tensor map without its swizzle")
    assert not survive
