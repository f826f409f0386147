"""Each Triton kernel as compiled for sm_80 and sm_90, in bfloat16; `python -m tests.ptx` runs them all."""

from __future__ import annotations

import random

import pytest

from fastlora.kernels.tiles import Target

from .__main__ import examine, write
from .cases import Case, quick

CASES = [case for arch in (80, 90) for case in quick(Target("cuda", arch))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_for_a_gpu(case: Case):
    seed = random.randrange(1 << 31)
    _, verdict, _ = examine(case, seed)
    assert verdict == "ok", f"seed {seed}"


def test_results_are_kept_by_launch(tmp_path):
    file = tmp_path / "made" / "results.json"
    write(file, {("cuda:90", "s"): "ok", ("cuda:90", "da"): "Fault: race"}, 1)
    write(file, {("cuda:90", "da"): "ok", ("cuda:80", "s"): "ok"}, 2)
    rows = [line.strip(",") for line in file.read_text().splitlines()[1:-1]]
    assert [row.count('"ok"') for row in rows] == [1, 1, 1] and '"cuda:80"' in rows[0]
