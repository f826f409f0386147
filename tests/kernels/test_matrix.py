"""The compile matrix itself, on a sample of what the command compiles: every kernel, few targets, real compiler."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from fastlora.kernels import gemm, matrix
from fastlora.kernels.dropout import Dropout, mask_bits
from fastlora.kernels.onepass import onepass_launch
from fastlora.kernels.tiles import RANK_TILES, TARGETS, WARP_SPECIALISED, Target, Tile, gemm_row

AMPERE, HOPPER = Target("cuda", 80), Target("cuda", 90)


def product(tile=None, dropout=False, R=16, n=4096, target=HOPPER):
    """A launch of the GEMM, forward or, with dropout, dX."""
    x, W, y = (torch.empty(n, n, dtype=torch.bfloat16, device="meta") for _ in range(3))
    s, B = (torch.empty(n, R, dtype=torch.bfloat16, device="meta") for _ in range(2))
    u = torch.empty(R, n, dtype=torch.bfloat16, device="meta") if dropout else B.t()
    bits = mask_bits(n, n, x.device) if dropout else None
    return gemm.gemm_launch(target, x, W if dropout else W.t(), y[0], s, u, bits, y, tile)


def test_a_sample_of_every_kernel_holds_its_claims():
    items = [(t, launch) for t, launch in matrix.launches([AMPERE], quick=True) if "bf16" in launch.label]
    assert {launch.label.split("/")[0] for _, launch in items} >= {*RANK_TILES, "gemm"}
    for report in map(matrix.examine, items):
        assert not report.failures and report.programs, report


@pytest.mark.parametrize("dropout", [False, True])
def test_hopper_multiplies_by_wgmma_in_registers_within_shared_memory(dropout):
    tile = gemm_row(HOPPER, "half", 16, True, dropout, True)[0]
    report = matrix.examine((HOPPER, product(tile, dropout)))
    assert not report.failures, report
    assert report.wgmma and report.spilled == 0 and report.shared <= 227 * 1024 and "128x256x64" in report.label


@pytest.mark.parametrize("dropout", [False, True])
def test_specialised_warps_multiply_so_too(dropout):
    report = matrix.examine((HOPPER, product(WARP_SPECIALISED, dropout)))
    assert not report.failures and report.wgmma and report.programs == 1 and report.kernel == "gemm_ws", report


def test_a_tile_that_spills_or_does_not_fit_is_reported():
    spills = matrix.examine((HOPPER, product(Tile(256, 256, 64, 4, 2, tma=True))))
    assert any("spills" in failure for failure in spills.failures)
    large = matrix.examine((HOPPER, product(Tile(128, 256, 64, 8, 5, tma=True))))
    assert any("shared memory" in failure for failure in large.failures)
    launch = product()
    broken = matrix.examine((HOPPER, dataclasses.replace(launch, args={**launch.args, "BLOCK_R": 3})))
    assert any("does not compile" in failure for failure in broken.failures)


def test_a_register_that_a_pending_wgmma_reads_may_not_be_written():
    """Triton's issue 9433: in a loop with two products the second one's register operand is made again too early."""
    x, W, y, A, B, S = (
        torch.empty(size, dtype=torch.bfloat16, device="meta")
        for size in ((512, 512), (512, 512), (512, 512), (16, 512), (512, 16), (512, 16))
    )
    launch = onepass_launch(
        HOPPER, x, W, None, A, B, 2.0, Dropout(0.1, matrix.SEED), y, S, Tile(64, 64, 32, 4, 3)
    )  # fmt: skip
    assert any("pending" in failure for failure in matrix.examine((HOPPER, launch)).failures)
    ptx = """
        L1:
        mov.b32 %r1, %r9;
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, {%r1,%r2}, %rd1, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 1;
        @%p1 bra L1;
    """
    assert matrix.overwritten(ptx) == "%r1"
    assert matrix.overwritten(ptx.replace("aligned 1;", "aligned 0;")) is None


def test_what_is_divisible_is_told_to_the_compiler():
    aligned, ragged = (product(Tile(64, 64, 32, 4, 2), R=3, n=n).compile(HOPPER).asm["ttir"] for n in (4096, 4097))
    assert re.search(r"i32 \{tt\.divisibility = 16", aligned)  # a size or a stride
    assert not re.search(r"i32 \{tt\.divisibility = 16", ragged)


@pytest.mark.parametrize("dropout", [False, True])
def test_every_offset_is_64_bits_wide(dropout):
    ir = product(Tile(64, 64, 32, 4, 2), dropout, n=4097).compile(HOPPER).asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*, tensor<\S*x(i\d+)>", ir)
    assert offsets and set(offsets) == {"i64"}
    products = re.findall(r"arith\.muli .*: tensor<\S*x(i\d+)>", ir)
    assert set(products) <= {"i64"}


def test_launches_cover_every_target_dtype_and_alignment():
    labels = [(target, launch.label) for target, launch in matrix.launches()]
    assert len(labels) == len(set(labels))
    for target in TARGETS:
        own = [label for t, label in labels if t == target]
        half = "bf16" if target.has_bfloat16 else "f16"
        for words in (
            (half, "aligned"),
            ("f32", "ragged"),
            (half, "u:f32"),
            ("gemm", "dropout/bits"),
            ("r128", "ragged"),
        ):
            assert any(all(word in label for word in words) for label in own), (target, words)


def test_command(capsys, tmp_path):
    out = tmp_path / "matrix.json"
    arguments = ["--quick", "--kernel", "gemm", "--target", "cuda:75", "--json", str(out), "--workers", "1"]
    status = matrix.main(arguments)
    said = capsys.readouterr().out
    assert status == 0, said
    assert "cuda:75" in said and "0 with a claim that fails" in said
    version, reports = matrix.read(out)
    assert version in said and reports and {*matrix.table(reports).splitlines()} <= {*said.splitlines()}
    assert (
        matrix.main(["--quick", "--kernel", "keep_mask", "--target", "80", "--json", str(out), "--workers", "1"]) == 0
    )
    assert set(reports) < set(matrix.read(out)[1])
    assert matrix.main([*arguments, "--missing"]) == 0 and "0 compiled" in capsys.readouterr().out


def test_the_committed_results_hold_every_claim_and_are_of_launches_that_there_are():
    (file,) = (matrix.RESULTS / "compile-matrix").glob("*.json")
    _, reports = matrix.read(file)
    there = {(str(target), launch.label) for target, launch in matrix.launches()}
    assert reports and not [
        report for report in reports if report.failures or (report.target, report.label) not in there
    ]
