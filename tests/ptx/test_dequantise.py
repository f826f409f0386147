"""The dequantisation of NF4 and FP4 as compiled for a GPU, run from its PTX: bitsandbytes' bits in every dtype."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import dequantise

from .gpu import Emulator

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_bitsandbytes(arch, quant_type, double, dtype):
    W = torch.randn(70, 130, generator=torch.Generator().manual_seed(0))
    q, state = bnb.quantize_4bit(W, quant_type=quant_type, compress_statistics=double)
    state.dtype = dtype
    out = torch.empty(70, 130, dtype=dtype)
    with Emulator(arch=arch):
        dequantise.launch(q.view(-1), state, out).run()
    assert torch.equal(out, bnb.dequantize_4bit(q, state))
