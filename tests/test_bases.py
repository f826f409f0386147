"""Quantised base weights: what `dense` makes of them, and LoRA over them against a reference that dequantises."""

from __future__ import annotations

from dataclasses import replace

import accuracy
import pytest
import torch

import fastlora
from fastlora.base_layer import dense, packed_of

bnb = pytest.importorskip("bitsandbytes")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FOUR_BIT = [(quant_type, double) for quant_type in ("nf4", "fp4") for double in (False, True)]


def four_bit(K, N, dtype, quant_type="nf4", double=True, bias=True, blocksize=64):
    layer = bnb.nn.Linear4bit(K, N, bias, dtype, double, quant_type)
    layer.weight.blocksize = blocksize
    layer.load_state_dict(torch.nn.Linear(K, N, bias, dtype=dtype).state_dict())
    return layer.to("cpu")


def eight_bit(K, N, dtype, bias=True):
    layer = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
    layer.load_state_dict(torch.nn.Linear(K, N, bias).state_dict())
    layer.to("cpu")
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer


def torchao(K, N, dtype, kind="Int8WeightOnlyConfig", bias=True):
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(K, N, bias, dtype=dtype)
    quantization.quantize_(layer, getattr(quantization, kind)())
    return layer


def of_package(layer, dtype):
    """The weight as its package dequantises it, in `dtype`."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        state = weight.quant_state
        state.dtype, kept = dtype, state.dtype
        made = bnb.functional.dequantize_4bit(weight.data, state)
        state.dtype = kept
        return made
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    return weight.dequantize().to(dtype)


BASES = {
    "nf4": four_bit,
    "fp4": lambda K, N, dtype: four_bit(K, N, dtype, "fp4", False),
    "int8": eight_bit,
    "torchao int8": torchao,
    "torchao float8": lambda K, N, dtype: torchao(K, N, dtype, "Float8WeightOnlyConfig"),
}


@pytest.mark.parametrize("quant_type, double", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("K, N, blocksize", [(64, 48, 64), (2048, 1500, 64), (1000, 1300, 64), (1026, 1100, 4096)])
def test_four_bits_are_dequantised_as_bitsandbytes_does(quant_type, double, dtype, K, N, blocksize):
    layer = four_bit(K, N, dtype, quant_type, double, blocksize=blocksize)
    packed, want = packed_of(layer, dtype), of_package(layer, dtype)
    assert torch.equal(dense(packed), want) and torch.equal(dense(packed, keep=True), want)


@pytest.mark.parametrize("kind", ["int8", "torchao int8", "torchao float8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_eight_bits_are_dequantised_as_their_package_does(kind, dtype):
    layer = BASES[kind](1024, 1100, dtype)
    assert torch.equal(dense(packed_of(layer, dtype)), of_package(layer, dtype))


def test_large_weights_share_one_buffer_of_the_thread_and_kept_ones_do_not():
    first, second = (packed_of(four_bit(2048, 1500, torch.bfloat16), torch.bfloat16) for _ in range(2))
    kept = dense(first, keep=True)
    with torch.inference_mode():
        shared = dense(first)
    assert dense(second).data_ptr() == shared.data_ptr() != kept.data_ptr()
    assert torch.equal(kept, dense(first))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["float32 adapter", "adapter of x"])
def test_error_rule_against_the_dequantised_reference(kind, dtype, adapter):
    layer = BASES[kind](512, 96, dtype)
    inputs = accuracy.draw(40, 96, 512, 4, dtype, adapter_dtype=adapter, bias=False)
    inputs = replace(inputs, weight=of_package(layer, dtype))

    def function(x, weight, *rest):
        return fastlora.lora_linear(x, packed_of(layer, dtype), *rest)

    assert not accuracy.violations(accuracy.run(function, inputs), inputs)
