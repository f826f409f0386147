"""csrc/cuda executed from nvcc's PTX: a sample of `python -m tests.cuda`. No GPU, no driver."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from fastlora import accuracy, autograd
from fastlora.kernels import cuda
from fastlora.paths import PATHS
from fastlora.paths.mask import philox_mask
from fastlora.paths.problem import Problem
from tests.cuda.cases import SEED, Case, call, violations
from tests.cuda.gpu import Emulated, host
from tests.cuda.mutants import Mutant, notice
from tests.ptx import nvcc
from tests.ptx.launch import Options

pytestmark = pytest.mark.skipif(nvcc.compiler() is None, reason="no nvcc (pip install nvidia-cuda-nvcc and its kin)")
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "case",
    [
        Case(264, 520, 264, 8, p=0.25, sms=5),  # two CTAs that stream; several tiles a CTA
        Case(130, 136, 264, 128, HALF, adapters_float=True, transposed=True, sms=4, padding=8, bias=False),
        Case(1, 8, 8, 1, sms=2),
    ],
    ids=lambda case: case.name,
)
def test_right(case):
    assert violations(case) == []


def test_schedules_change_no_bit():
    """Other CTAs stream, warps run in other orders: the same bits, for every sum has one order."""
    first, _ = call(Case(264, 136, 264, 24, p=0.3, sms=3), Emulated(3))
    again, _ = call(Case(264, 136, 264, 24, p=0.3, sms=6), Emulated(6, Options(seed=1)))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_as_a_path():
    """By the road of eager calls: x of three dimensions that TMA cannot read, a weight that lies by columns."""
    inputs = accuracy.draw(40, 24, 16, 4, BRAIN)
    wide = torch.zeros(2, 20, 17, dtype=BRAIN)
    inputs = replace(inputs, x=wide[..., 1:], weight=inputs.weight.t().contiguous().t(), dy=inputs.dy.view(2, 20, 24))
    inputs.x.copy_(accuracy.draw(40, 24, 16, 4, BRAIN).x.view(2, 20, 16))

    def function(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
        return autograd.run(PATHS["cuda"], x, weight, lora_A, lora_B, bias, scaling, dropout_p)

    with Emulated(2) as gpu:
        out = accuracy.run(function, inputs)
    assert accuracy.violations(out, inputs) == []
    assert [name for name, _ in gpu.launches] == ["forward_bf16_r16", "backward_bf16_r16"]


def test_what_is_not_needed_is_not_made():
    out, inputs = call(Case(130, 136, 136, 8, p=0.3, need="B", sms=3), Emulated(3))
    assert set(out) == {"Y", "dB"} and accuracy.violations(out, inputs) == []


def test_the_mask_is_the_project_s():
    """Ones through an identity: what is not zero in S is what the mask keeps."""
    M, K = 40, 64
    x, eye = torch.ones(M, K, dtype=BRAIN), torch.eye(K, dtype=BRAIN)
    y, zero = torch.empty(M, 8, dtype=BRAIN), torch.zeros(8, K, dtype=BRAIN)
    with Emulated(2):
        S = cuda.forward(x, zero, None, eye, zero, 1.0, 0.3, torch.tensor([SEED]), y)
    assert torch.equal(S != 0, philox_mask(torch.tensor(SEED), M, K, 0.3))
    assert not y.any()


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("forward", "flag not waited for", 1),
        Mutant("forward", "no proxy fence", 10),
        Mutant("backward", "wrong phase", 0),
    ],
    ids=lambda mutant: f"{mutant.kernel} {mutant.kind}",
)
def test_broken_copies_are_noticed(mutant):
    assert notice(mutant)


def test_split():
    """The split of a launch's CTAs is arithmetic: what it minimises, it minimises; no GPU is asked."""
    with Emulated():
        library = cuda.library()
        for M, N, K in ((8192, 4096, 4096), (1, 4096, 4096), (8192, 768, 768), (300, 520, 264), (4096, 11008, 4096)):
            for mask in (0, 1):
                rows = -(-M // 128)
                shape = (132, M, K, rows * -(-N // 256), K, mask, 1e6)
                best = library.fastlora_cuda_split(*shape)
                times = {s: library.fastlora_cuda_predicted_us(s, *shape) for s in range(1, min(rows, 131) + 1)}
                assert times[best] == min(times.values())
        # eight waves of tiles leave four SMs free, which would stream for longer than a ninth wave takes
        assert library.fastlora_cuda_split(132, 8192, 4096, 1024, 4096, 0, 0.0) == 18
        assert library.fastlora_cuda_split(132, 8192, 4096, 1024, 4096, 1, 0.0) == 18


def test_refusals():
    problem = Problem(8, 16, 16, 4, BRAIN, BRAIN, torch.device("cpu"), False)
    assert cuda.unsupported(problem) is None
    for change, reason in (
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"adapter_dtype": HALF}, "x's dtype and float32"),
        ({"R": 129}, "1 to 128"),
        ({"M": 0}, "nothing to multiply"),
        ({"K": 12}, "multiples of 8"),
    ):
        assert reason in cuda.unsupported(problem._replace(**change))
    assert "NVIDIA" in cuda.why_not(torch.device("cpu"))
    x, weight, A, B = (torch.zeros(n, 24, dtype=BRAIN) for n in (8, 8, 4, 8))
    y = torch.zeros(8, 8, dtype=BRAIN)
    B = B[:, :4]
    with Emulated() as gpu:
        with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
            cuda.forward(x[:, 4:20], weight[:, :16], None, A[:, :16], B, 1.0, 0.0, None, y)
        with pytest.raises(RuntimeError, match="overlap"):
            cuda.forward(x.as_strided((8, 24), (16, 1)), weight, None, A, B, 1.0, 0.0, None, y)
        gpu.driver.driver_set(gpu.callback, gpu.sms, 0)  # no CTA fits an SM
        with pytest.raises(RuntimeError, match="does not fit"):
            cuda.forward(x, weight, None, A, B, 1.0, 0.0, None, y)
        assert gpu.launches == []


def test_without_a_driver():
    lib = ctypes.CDLL(str(host()[0]))
    lib.fastlora_cuda_error.restype = ctypes.c_char_p
    assert b"libcuda" in lib.fastlora_cuda_error(lib.fastlora_cuda_open(b"/nowhere/libcuda.so.1"))
