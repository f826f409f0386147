"""The dequantisation of NF4 and FP4 against bitsandbytes' own on a CPU: the same bits.

But for the sign of FP4's second zero, in which bitsandbytes differs from itself: it hangs on the width of its vectors.
"""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import dequantise

bnb = pytest.importorskip("bitsandbytes.functional")


def quantised(N, K, quant_type, double, blocksize=64, storage=torch.uint8):
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(N)) * 0.3
    W[0, 0] = 7.0
    packed, state = bnb.quantize_4bit(
        W, blocksize=blocksize, compress_statistics=double, quant_type=quant_type, quant_storage=storage
    )
    return packed.view(torch.uint8).view(-1), state


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, K, blocksize", [(64, 128, 64), (70, 514, 64), (48, 1024, 256), (300, 200, 128)])
def test_same_bits_as_bitsandbytes(quant_type, double, dtype, N, K, blocksize):
    q, state = quantised(N, K, quant_type, double, blocksize)
    state.dtype = dtype
    want = bnb.dequantize_4bit(q, state)
    # Triton's interpreter cuts what it should round to bfloat16
    out = torch.full((N, K), torch.nan, dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
    dequantise.launch(q, state, out).run()
    assert torch.equal(out.to(dtype), want)


def test_other_storage():
    q, state = quantised(64, 64, "nf4", True, storage=torch.bfloat16)
    out = torch.empty(64, 64)
    dequantise.launch(q, state, out).run()
    assert torch.equal(out, bnb.dequantize_4bit(q, state))


def test_a_kernel_that_differs_is_not_admitted(monkeypatch):
    monkeypatch.setattr(dequantise, "_admitted", {})
    q, state = quantised(64, 64, "nf4", False)
    want = bnb.dequantize_4bit(q, state)
    assert torch.equal(dequantise.four_bits(q, state, want.shape, want.dtype, lambda: want), want)
    assert list(dequantise._admitted.values()) == [True]
    monkeypatch.setattr(dequantise, "_admitted", {})
    with pytest.warns(UserWarning, match="differs"):
        assert torch.equal(dequantise.four_bits(q, state, want.shape, want.dtype, lambda: want + 1), want + 1)
    calls = []
    dequantise.four_bits(q, state, want.shape, want.dtype, lambda: calls.append(1) or want)
    assert calls == [1]


def test_a_packed_weight_is_dequantised_by_the_kernel():
    from bitsandbytes.nn import Linear4bit

    from fastlora.base_layer import dense, packed_of
    from fastlora.record import recording

    layer = Linear4bit(128, 96, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    with recording() as launches:
        got = dense(packed_of(layer, torch.float32))
    assert [launch.fn for launch, _ in launches] == [dequantise.dequantise_kernel]
    assert torch.equal(got, bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
