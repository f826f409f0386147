"""Thread blocks that speak to each other: flags, fences, atomics, who must be there; what breaks without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from . import nvcc
from .launch import Options, Tensors, run
from .machine import Program
from .memory import Fault
from .parse import parse

SOURCE = Path(__file__).parent / "cuda" / "flags.cu"
SEEDS = [None, *range(6)]
pytestmark = pytest.mark.skipif(not nvcc.compiler(), reason="no nvcc: pip install fastlora-kernels[cuda]")


def launch(kernel: str, tensors, grid: int, threads: int, *defines: str, **options) -> None:
    memory = Tensors()
    program = Program(parse(nvcc.ptx(SOURCE, "sm_90a", *defines), kernel))
    run(program, [memory.address(t) for t in tensors], (grid,), threads, memory, 0, Options(**options))
    memory.fetch()


def produce(*defines, **options):
    x, y, z, flag = torch.randn(64), torch.zeros(64), torch.zeros(3, 64), torch.zeros(1, dtype=torch.int32)
    launch("produce", (x, y, z, flag), 4, 64, *defines, **options)
    assert torch.equal(z, (2 * x + 1).roll(-37).expand(3, 64))


@pytest.mark.parametrize("seed", SEEDS)
def test_release_and_acquire(seed):
    produce(seed=seed)
    produce(seed=seed, resident=2)  # block 0 is among the first


@pytest.mark.parametrize("defines", [
    ('-DRELEASE="st.relaxed.gpu.global.u32"',), ('-DACQUIRE="ld.relaxed.gpu.global.u32"',), ("-DSYNC=",),
    ('-DRELEASE="st.release.cta.global.u32"',), ('-DACQUIRE="ld.acquire.cta.global.u32"',),
    ('-DRELEASE="st.global.u32"',),
])  # fmt: skip
def test_flag_that_orders_nothing(defines):
    with pytest.raises(Fault, match="race"):
        for seed in SEEDS:
            produce(*defines, seed=seed)


def test_flag_that_nobody_raises():
    with pytest.raises(Fault, match="deadlock"):
        produce('-DRELEASE="st.release.gpu.global.u32 [%0], 0; //"')


def last_adds(*defines, **options):
    x, partial, out = torch.randn(72), torch.zeros(9), torch.zeros(1)
    launch("last_adds", (x, partial, out, torch.zeros(1, dtype=torch.int32)), 9, 32, *defines, **options)
    torch.testing.assert_close(out[0], x.sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_last_block(seed):
    last_adds(seed=seed)
    with pytest.raises(Fault, match="race"):
        last_adds("-DFENCE=", seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_meet(seed):
    count, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    launch("meet", (count, seen), 5, 32, seed=seed, resident=5)
    assert (seen == 5).all()
    with pytest.raises(Fault, match="deadlock"):
        launch("meet", (count.zero_(), seen), 5, 32, seed=seed, resident=4)


@pytest.mark.parametrize("seed", SEEDS)
def test_calls_local_memory_and_atomics(seed):
    out, total = torch.arange(64, dtype=torch.int32), torch.tensor([1, 2, 5, 1], dtype=torch.int32)
    launch("odds", (out, total), 1, 64, seed=seed)
    assert total.tolist() == [1 + 64 * 63, 126, 6, 2]
    i = np.arange(64)
    assert out.tolist() == np.where((2 * i - i) % 4 == 0, i, 7).tolist()
