"""Quantised base weights: what `dense` makes of them, and LoRA over them against a reference that dequantises."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import accuracy
import pytest
import torch

import fastlora
from fastlora import autograd, choice, functional, packed
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


def torchao(K, N, dtype, kind="Int8WeightOnlyConfig", **config):
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(K, N, dtype=dtype)
    quantization.quantize_(layer, getattr(quantization, kind)(**config))
    return layer


def torchao_int4(K, N, dtype):
    granularity = pytest.importorskip("torchao.quantization").PerGroup(32)
    return torchao(K, N, dtype, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity)


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
    "torchao int4": torchao_int4,
    "torchao float8": lambda K, N, dtype: torchao(K, N, dtype, "Float8WeightOnlyConfig"),
}


@pytest.mark.parametrize("quant_type, double", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("K, N, blocksize", [(64, 48, 64), (2048, 1500, 64), (1000, 1300, 64), (1026, 1100, 4096)])
def test_four_bits_are_dequantised_as_bitsandbytes_does(quant_type, double, dtype, K, N, blocksize):
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile what it has no CPU kernel for
        layer = four_bit(K, N, dtype, quant_type, double, blocksize=blocksize)
        weight, want = packed_of(layer, dtype), of_package(layer, dtype)
        assert torch.equal(dense(weight), want) and torch.equal(dense(weight, keep=True), want)


@pytest.mark.parametrize("N, K", [(40, 96), (5, 16), (33, 48), (2, 1), (40, 128)])
def test_four_bits_of_rows_that_are_no_whole_blocks(N, K, monkeypatch):
    """bitsandbytes' own CPU kernel gets some of these wrong."""
    layer = four_bit(K, N, torch.float32, double=False)
    state, q = layer.weight.quant_state, layer.weight.data.view(-1)
    values = state.code[torch.stack([q >> 4, q & 15], 1).view(-1).long()][: N * K]
    want = (values * state.absmax.repeat_interleave(64)[: N * K]).view(N, K)
    assert torch.equal(dense(packed_of(layer, torch.float32)), want)
    monkeypatch.setattr(packed, "_CHUNK", 64)
    assert torch.equal(dense(packed_of(layer, torch.float32)), want)


@pytest.mark.parametrize("kind", ["int8", "torchao int8", "torchao int4", "torchao float8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_others_are_dequantised_as_their_package_does(kind, dtype):
    layer = BASES[kind](1024, 1100, dtype)
    assert torch.equal(dense(packed_of(layer, dtype)), of_package(layer, dtype))


@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_a_forward_makes_a_weight_dense_once(path, monkeypatch):
    weight, made = packed_of(four_bit(64, 32, torch.float32), torch.float32), []
    kind, made_dense = type(weight), type(weight).dense
    monkeypatch.setattr(kind, "dense", lambda self, *rest: made.append(1) or made_dense(self, *rest))
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    for calls in (1, 2, 3):
        fastlora.lora_linear(torch.randn(5, 64), weight, A, B, dropout_p=0.1, path=path)
        assert len(made) == calls


def test_large_weights_share_one_buffer_of_the_thread_and_kept_ones_do_not():
    first, second = (packed_of(four_bit(2048, 1500, torch.bfloat16), torch.bfloat16) for _ in range(2))
    kept = dense(first, keep=True)
    with torch.inference_mode():
        shared = dense(first)
    assert dense(second).data_ptr() == shared.data_ptr() != kept.data_ptr()
    assert torch.equal(kept, dense(first))


def test_the_buffer_is_freed_with_the_weight_for_which_it_grew():
    packed._reused.__dict__.clear()
    small, large = (four_bit(2048, N, torch.float32) for N in (1500, 1600))
    for layer in (small, large, small):
        assert dense(packed_of(layer, torch.float32)).shape == layer.weight.quant_state.shape
    held = packed._reused.held[torch.float32]
    assert held.numel() == 2048 * 1600
    del small, layer
    gc.collect()
    assert packed._reused.held[torch.float32] is held
    del large
    gc.collect()
    assert not packed._reused.held


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


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_layer_over_a_quantised_base(kind, use_dora):
    base = BASES[kind](128, 96, torch.float32)
    layer = fastlora.FusedLoRALinear.from_linear(base, r=4, use_dora=use_dora)
    assert layer.weight is base.weight and layer.lora_A.dtype is torch.float32
    plain = torch.nn.Linear(128, 96)
    plain.weight.data, plain.bias.data = of_package(base, torch.float32), base.bias.data
    twin = fastlora.FusedLoRALinear.from_linear(plain, r=4, use_dora=use_dora)
    with torch.no_grad():
        layer.lora_B.normal_()
        twin.lora_A.copy_(layer.lora_A), twin.lora_B.copy_(layer.lora_B)
    x = torch.randn(5, 128, requires_grad=True)
    y, want = layer(x), twin(x)
    torch.testing.assert_close(y, want)
    for mine, theirs in zip(
        torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B]),
        torch.autograd.grad(want.square().sum(), [x, twin.lora_A, twin.lora_B]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    stored = layer.state_dict()["weight"]
    layer.merge(), twin.merge()
    torch.testing.assert_close(layer(x), twin(x))
    if "torchao" not in kind:  # whose tensors know no equality
        assert torch.equal(layer.state_dict()["weight"], stored)
    layer.unmerge()
    assert layer.weight is base.weight
    torch.testing.assert_close(layer(x), y)
    if "nf4" in kind:
        assert {"weight.absmax", "weight.nested_absmax"} <= layer.state_dict().keys()


@pytest.mark.parametrize("use_dora", [False, True])
def test_backward_keeps_what_is_packed_and_nothing_dense(use_dora):
    layer = fastlora.FusedLoRALinear.from_linear(four_bit(128, 96, torch.float32), r=4, use_dora=use_dora)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(torch.randn(5, 128, requires_grad=True))
    assert kept and torch.Size((96, 128)) not in kept
    with_graph = sys.getrefcount(layer.weight)
    y.sum().backward()
    del y
    without = sys.getrefcount(layer.weight)
    assert without == with_graph - 1


def test_inject_over_four_bits_and_the_adapter_of_a_base_that_computes_in_16_bits():
    model = torch.nn.Sequential(four_bit(64, 64, torch.bfloat16), torch.nn.Tanh(), four_bit(64, 32, torch.bfloat16))
    weight = model[0].weight
    fastlora.inject(model, r=2, adapter_dtype=torch.float32)
    assert model[0].weight is weight and model[2].lora_A.dtype is torch.float32
    y = model(torch.randn(3, 64))
    assert y.dtype is torch.float32
    y.sum().backward()
    assert model[2].lora_B.grad is not None
    assert fastlora.explain(model[0], torch.randn(3, 64)).path in ("cpu", "torch")


def test_reasons_for_which_a_base_is_refused():
    fresh = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(TypeError, match=r"quantised when it is moved .* call model.to\(device\) first$"):
        fastlora.FusedLoRALinear.from_linear(fresh)
    with pytest.raises(TypeError, match="kept in 16 bits"):
        fastlora.FusedLoRALinear.from_linear(bnb.nn.Linear8bitLt(64, 64).to("cpu"))
    layer = fastlora.FusedLoRALinear.from_linear(four_bit(64, 32, torch.float32))
    with pytest.raises(ValueError, match=r"x has shape \(3, 65\) and weight \(32, 64\)"):
        layer(torch.randn(3, 65))
    with pytest.raises(TypeError, match="drawn anew"):
        layer.reset_parameters()


def test_what_torchao_does_not_dequantise_or_does_to_x_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    layer = torchao(64, 32, torch.bfloat16, "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(TypeError, match="torchao changes x too, by the weight's act_quant_kwargs"):
        fastlora.FusedLoRALinear.from_linear(layer)
    # its packages are for GPUs, where alone it is made otherwise
    q, scale = torch.zeros(32, 32, dtype=torch.int8), torch.ones(2, 32, dtype=torch.bfloat16)
    weight = quantization.Int4Tensor(q, scale, scale, [1, 32], torch.Size((32, 64)))
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match="torchao does not dequantise a Int4Tensor"):
        fastlora.FusedLoRALinear.from_linear(layer)


def test_explain_names_the_dtype_that_the_base_computes_in(monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "choose", asked.append)
    layer = fastlora.FusedLoRALinear.from_linear(four_bit(64, 32, torch.bfloat16))
    fastlora.explain(layer, torch.randn(3, 64))
    assert asked[0].dtype is torch.bfloat16


def test_nothing_is_imported_until_it_is_needed():
    import subprocess
    import sys

    code = "import fastlora, sys; print({'bitsandbytes', 'torchao', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("kind", BASES)
def test_compiled_without_graph_breaks(kind):
    torch._dynamo.reset()
    layer = fastlora.FusedLoRALinear.from_linear(BASES[kind](128, 96, torch.float32), r=4)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 128, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    both = [[y, *torch.autograd.grad(y.sum(), [x, layer.lora_A])] for y in (compiled(x), layer(x))]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_is_no_module_is_named_where_bitsandbytes_is_loaded():
    with pytest.raises(TypeError, match=r"must be an nn.Linear"):
        fastlora.FusedLoRALinear.from_linear(None)


@pytest.mark.parametrize("cpp", [True, False])
def test_a_weight_changed_in_place_before_backward_is_refused(cpp, monkeypatch):
    if not cpp:
        monkeypatch.setattr(autograd, "NODE", None)
        monkeypatch.setattr(functional, "NODE", None)
    layer = fastlora.FusedLoRALinear.from_linear(four_bit(64, 32, torch.float32), r=4)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()
    layer(x).sum().backward()  # another call sees the new one


def test_a_patched_layer_sees_a_weight_changed_in_place():
    peft = pytest.importorskip("peft")
    import fastlora.peft

    model = torch.nn.Sequential(four_bit(64, 32, torch.float32))
    model = fastlora.peft.patch(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"])))
    x = torch.randn(5, 64)
    before = [model(x) for _ in range(3)][-1]
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.zero_()
    assert not torch.equal(model(x), before) and fastlora.peft.report(model).fallback_calls == 0


def test_compiled_autograd_over_a_quantised_weight():
    import torch._dynamo.compiled_autograd as compiled

    layer = fastlora.FusedLoRALinear.from_linear(four_bit(64, 32, torch.float32), r=4)
    x = torch.randn(5, 64, requires_grad=True)
    want = torch.autograd.grad(layer(x).square().sum(), x)[0]
    with compiled._enable(lambda graph: torch.compile(graph, backend="eager")):
        layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, want)
