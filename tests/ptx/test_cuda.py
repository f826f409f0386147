"""A warp-specialised CUDA C++ kernel for sm_90a, compiled by nvcc, and what the emulator says of broken copies."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from . import nvcc
from .launch import Options, Tensors, run, tensor_map
from .machine import Program
from .memory import Fault
from .parse import parse

SOURCE = Path(__file__).parent / "cuda" / "gemm_sm90.cu"
SWIZZLE_128 = 3


pytestmark = pytest.mark.skipif(not nvcc.compiler(), reason="no nvcc: pip install fastlora-kernels[cuda]")


@pytest.fixture(scope="module")
def ptx() -> str:
    return nvcc.ptx(SOURCE)


def gemm(text: str, M=135, N=96, K=200, R=16, **options) -> None:
    torch.manual_seed(0)
    x, w, s, u = (torch.randn(rows, columns).bfloat16() for rows, columns in ((M, K), (N, K), (M, R), (N, R)))
    y = torch.empty(M, N, dtype=torch.bfloat16)
    memory = Tensors()
    maps = [tensor_map(memory.address(t), t, (64, 64), SWIZZLE_128) for t in (x, w, s, u)]
    values = [*maps, memory.address(y, written=False), *(np.int32(n) for n in (M, N, K))]
    grid = (-(-N // 64), -(-M // 64))
    run(Program(parse(text)), values, grid, 160, memory, 3 * 2 * 64 * 64 * 2, Options(**options))
    memory.fetch()
    want = x.double() @ w.double().T + s.double() @ u.double().T
    assert ((y.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-4).all()


@pytest.mark.parametrize("by_warp", [False, True])
@pytest.mark.parametrize("order", [{"late": True}, {"late": False}, {"seed": 0}, {"seed": 1}])
def test_right(ptx, order, by_warp):
    gemm(ptx, wgmma_by_warp=by_warp, **order)
    gemm(ptx, M=64, N=64, K=64, wgmma_by_warp=by_warp, **order)
    gemm(ptx, M=1, N=8, K=8, R=8, wgmma_by_warp=by_warp, **order)


# What is changed in the PTX, and what the emulator says then.
BROKEN = {
    "consumer goes on unasked": (r"(?s)(BB0_4:.*?)(selp\.b32 %r\d+), 1, 0, p;", r"\1\2, 1, 1, p;", "race"),
    "no wgmma.wait_group": (r"wgmma\.wait_group[^;]*;", "", "race|accumulators"),
    "stage given back twice": (r"(mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)", r"\1\n\1", "deadlock|arrivals"),
    "stage not given back": (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", "deadlock"),
    "bytes short": (r"(mov\.u32\s+%r\d+, )16384;", r"\g<1>16368;", "deadlock|race"),
    "bytes over": (r"(mov\.u32\s+%r\d+, )16384;", r"\g<1>16400;", "deadlock"),
    "no barrier after init": (r"bar\.sync\s+0;", "", "race"),
    "descriptor of another stride": (r"46116862933\d+", lambda m: str(int(m[0]) + (1 << 32)), "shared|assert|race"),
    "row guard": (r"setp\.ge\.s32", "setp.gt.s32", "out of bounds"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(ptx, name):
    pattern, becomes, what = BROKEN[name]
    text, count = re.subn(pattern, becomes, ptx)
    assert count, "the compiler writes it otherwise now"
    with pytest.raises((Fault, AssertionError), match=what):
        gemm(text)
