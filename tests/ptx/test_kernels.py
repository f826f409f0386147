"""Each Triton kernel as compiled for sm_80 and sm_90, in bfloat16 and once in tf32; `python -m tests.ptx` runs all."""

from __future__ import annotations

import random

import pytest
import torch

from fastlora.kernels.tiles import Target, Tile

from .__main__ import examine, write
from .cases import Case, quick, run, tf32
from .gpu import Emulator
from .memory import Fault

CASES = [case for arch in (80, 90) for case in [*quick(Target("cuda", arch)), *tf32(Target("cuda", arch))]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_for_a_gpu(case: Case):
    seed = random.randrange(1 << 31)
    _, verdict, _ = examine(case, seed)
    assert verdict == "ok", f"seed {seed}"


def test_a_register_that_a_pending_wgmma_reads_is_written():
    """Triton's issue 9433 in a tile that was ours: right when wgmma ends at once, wrong when it takes its time."""
    tile = Tile(64, 64, 32, num_warps=4, num_stages=3)
    case = Case(Target("cuda", 90), "onepass", *[torch.bfloat16] * 2, False, "aligned", 16, "seed", (1, 1), tile)
    with Emulator(90, late=False):
        run(case)
    with pytest.raises(Fault, match="registers of A were changed"), Emulator(90, late=True):
        run(case)


def test_results_are_kept_by_launch(tmp_path):
    file = tmp_path / "made" / "results.json"
    write(file, {("cuda:90", "s"): "ok", ("cuda:90", "da"): "Fault: race"}, 1)
    write(file, {("cuda:90", "da"): "ok", ("cuda:80", "s"): "ok"}, 2)
    rows = [line.strip(",") for line in file.read_text().splitlines()[1:-1]]
    assert [row.count('"ok"') for row in rows] == [1, 1, 1] and '"cuda:80"' in rows[0]
