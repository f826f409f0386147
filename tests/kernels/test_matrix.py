"""The compile matrix itself, on a sample of what the command compiles: every kernel, few targets, real compiler."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from fastlora.kernels import matrix
from fastlora.kernels.gemm_specimens import specimen
from fastlora.kernels.gemm_tiles import tiles_of
from fastlora.kernels.tiles import TARGETS, Target, Tile

HOPPER = Target("cuda", 90)
ROOT = Path(__file__).resolve().parents[2]


def hopper(kind="forward", dropout=False, R=16, tile=None, layout="aligned"):
    tile = tile or tiles_of(HOPPER, "tma dropout" if dropout else "tma", R)[0]
    return specimen(HOPPER, tile, kind, dropout, R, torch.bfloat16, torch.bfloat16, layout)


@pytest.mark.parametrize("kernel", matrix.KERNELS)
def test_a_sample_of_every_kernel_holds_its_claims(kernel):
    items = list(matrix.specimens([Target("cuda", 80)], [kernel], quick=True))
    if kernel == "gemm":
        assert items
    for report in map(matrix.examine, items):
        assert not report.failures, report


@pytest.mark.parametrize("kind, dropout", [("forward", False), ("dx", False), ("dx", True)])
def test_hopper_multiplies_by_wgmma_in_registers_within_shared_memory(kind, dropout):
    report = matrix.examine(("gemm", hopper(kind, dropout)))
    assert not report.failures, report
    assert report.wgmma and report.spilled == 0 and report.shared <= 227 * 1024 and report.tile.startswith("128x256x64")


def test_a_tile_that_spills_or_does_not_fit_is_reported():
    spills = matrix.examine(("gemm", hopper(tile=Tile(256, 256, 64, 4, 2, tma=True, persistent=True))))
    assert any("spills" in failure for failure in spills.failures)
    large = matrix.examine(("gemm", hopper(tile=Tile(128, 256, 64, 8, 5, tma=True, persistent=True))))
    assert any("shared memory" in failure for failure in large.failures)
    broken = matrix.examine(("gemm", dataclasses.replace(hopper(), args={**hopper().args, "BLOCK_R": 3})))
    assert any("does not compile" in failure for failure in broken.failures)


def test_what_is_divisible_is_told_to_the_compiler():
    aligned, ragged = (
        matrix.compiled(hopper(R=3, tile=Tile(64, 64, 32, 4, 2), layout=layout)).asm["ttir"]
        for layout in ("aligned", "ragged")
    )
    assert re.search(r"i32 \{tt\.divisibility = 16", aligned)  # a size or a stride
    assert not re.search(r"i32 \{tt\.divisibility = 16", ragged)


@pytest.mark.parametrize("dropout", [False, True])
def test_every_offset_is_64_bits_wide(dropout):
    ir = matrix.compiled(hopper("dx", dropout, tile=Tile(64, 64, 32, 4, 2), layout="ragged")).asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*, tensor<\S*x(i\d+)>", ir)
    assert offsets and set(offsets) == {"i64"}
    products = re.findall(r"arith\.muli .*: tensor<\S*x(i\d+)>", ir)
    assert set(products) <= ({"i64", "i32"} if dropout else {"i64"})  # Philox multiplies 32-bit words


def test_specimens_cover_every_target_dtype_and_alignment():
    labels = {(str(s.target), s.label) for _, s in matrix.specimens(kernels=["gemm"])}
    for target in TARGETS:
        of_target = [label for name, label in labels if name == str(target)]
        for word in ("f16/f16", "f32/f32", "bf16/f32", "aligned", "ragged", "dx dropout", "r128"):
            if word.startswith("bf16") and not target.has_bfloat16:
                continue
            assert any(word in label for label in of_target), (target, word)


def test_command(capsys, tmp_path):
    out = tmp_path / "matrix.json"
    status = matrix.main(["--quick", "--kernel", "gemm", "--target", "cuda:75", "--json", str(out), "--workers", "1"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "cuda:75" in said and "0 with a claim that fails" in said and "triton" in out.read_text()


def test_the_committed_matrix_holds_every_claim_and_is_the_readmes():
    (file,) = (ROOT / "benchmarks" / "results" / "compile-matrix").glob("*.json")
    document = json.loads(file.read_text())
    assert not [report for report in document["reports"] if report["failures"]]
    assert {report["target"] for report in document["reports"]} == set(map(str, TARGETS))
    assert matrix.summary(document) in (ROOT / "README.md").read_text()
