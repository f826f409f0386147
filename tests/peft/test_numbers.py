"""A patched layer's numbers, held to the error rule against float64, for all that LoraConfig sets on a linear layer."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import accuracy
import pytest
import torch
from conftest import build, layer_of, twins
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora.peft

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def peft_layer(inputs: accuracy.Inputs, conv1d=False, dropout=0.0) -> lora.Linear:
    """PEFT's layer with the tensors of `inputs`."""
    N, K = inputs.weight.shape
    model = nn.Sequential(Conv1D(N, K) if conv1d else nn.Linear(K, N, bias=inputs.bias is not None))
    config = LoraConfig(r=inputs.lora_A.shape[0], target_modules=["0"], lora_dropout=dropout, fan_in_fan_out=conv1d)
    layer = get_peft_model(model.to(inputs.x.dtype), config).base_model.model[0]
    weight = inputs.weight.t().contiguous() if conv1d else inputs.weight
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    if inputs.bias is not None:
        layer.base_layer.bias = nn.Parameter(inputs.bias, requires_grad=False)
    layer.lora_A["default"].weight = nn.Parameter(inputs.lora_A.clone())
    layer.lora_B["default"].weight = nn.Parameter(inputs.lora_B.clone())
    layer.scaling["default"] = inputs.scaling
    return layer


def outputs(layer: lora.Linear, inputs: accuracy.Inputs) -> dict:
    """Forward and backward of a layer, as `accuracy.run` gives them for a function."""
    x = inputs.x.detach().requires_grad_()
    y = layer(x)
    y.backward(inputs.dy.to(y.dtype))
    return {
        "Y": y.detach(),
        "dX": x.grad,
        "dA": layer.lora_A["default"].weight.grad,
        "dB": layer.lora_B["default"].weight.grad,
    }


def fused_calls(layer) -> int:
    report = fastlora.peft.report(layer)
    assert report.fallback_calls == 0
    return report.fused_calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("R", [1, 8, 17])
def test_error_rule(dtype, adapter_dtype, conv1d, R):
    inputs = accuracy.draw(33, 29, 41, R, dtype, adapter_dtype=adapter_dtype, seed=R)
    layer = fastlora.peft.patch(peft_layer(inputs, conv1d))
    found = accuracy.violations(outputs(layer, inputs), inputs)
    assert not found, found
    assert fused_calls(layer) == 1


def test_leading_dimensions_and_no_bias():
    inputs = accuracy.draw(24, 29, 41, 4, torch.float32, bias=False)
    inputs = replace(inputs, x=inputs.x.view(2, 3, 4, 41), dy=inputs.dy.view(2, 3, 4, 29))
    layer = fastlora.peft.patch(peft_layer(inputs))
    assert not accuracy.violations(outputs(layer, inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_own_layer_passes_the_rule_too(dtype):
    """The rule's reference is what PEFT computes, so PEFT itself is within it."""
    inputs = accuracy.draw(33, 29, 41, 8, dtype, adapter_dtype=torch.float32)
    assert not accuracy.violations(outputs(peft_layer(inputs), inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_in_training_and_none_in_evaluation(dtype, p):
    inputs = accuracy.draw(40, 24, 64, 8, dtype, adapter_dtype=torch.float32)
    layer = fastlora.peft.patch(peft_layer(inputs, dropout=p))
    torch.manual_seed(5)
    got = outputs(layer, inputs)
    # the same draw again, through an identity: x = 1, A = I, W = 0, so that Y shows the mask
    probe = accuracy.draw(40, 64, 64, 64, torch.float32, bias=False)
    eye = torch.eye(64)
    probe = replace(probe, x=torch.ones(40, 64), weight=torch.zeros(64, 64), lora_A=eye, lora_B=eye, scaling=1.0)
    probe_layer = fastlora.peft.patch(peft_layer(probe, dropout=p))
    torch.manual_seed(5)
    shown = probe_layer(probe.x).detach()
    mask = shown != 0
    assert abs(mask.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    torch.testing.assert_close(shown[mask], torch.full_like(shown[mask], 1 / (1 - p)), rtol=1e-3, atol=0)
    found = accuracy.violations(got, replace(inputs, dropout_p=p, mask=mask))
    assert not found, found
    layer.zero_grad()
    layer.eval()
    assert not accuracy.violations(outputs(layer, inputs), inputs)
    assert fused_calls(layer) == 2


@pytest.mark.parametrize("drops", [False, True])
def test_the_dropout_modules_own_mode_counts(drops):
    """PEFT calls the module, whose `training` need not be its layer's."""
    inputs = accuracy.draw(40, 24, 64, 8, torch.float32)
    layer = fastlora.peft.patch(peft_layer(inputs, dropout=0.5)).train(not drops)
    layer.lora_dropout["default"].train(drops)
    for _ in range(2):  # the call that examines the layer, and one that need not
        assert torch.equal(layer(inputs.x), layer(inputs.x)) != drops
    assert fused_calls(layer) == 4


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"first": 3, "conv": 9}, "alpha_pattern": {"last": 40}},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"lora_dropout": 0.2, "inference_mode": True},
    ],
    ids=str,
)
def test_configurations(config):
    stock, model = twins(torch.float64, **config)
    fastlora.peft.patch(model)
    x = torch.randn(6, 24, dtype=torch.float64)
    for m in (stock, model):
        m.train(not config.get("inference_mode", False))
    y, want = model(x), stock(x)
    torch.testing.assert_close(y, want)
    if not config.get("inference_mode"):
        want.square().sum().backward()
        y.square().sum().backward()
        for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    report = fastlora.peft.report(model)
    assert (report.fused_calls, report.fallback_calls) == (3, 0)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_autocast(base, adapter):
    """Against float64 as everywhere: twice PEFT's own error under the same autocast, and two units of bfloat16."""
    inputs = accuracy.draw(48, 32, 40, 8, base, adapter_dtype=adapter)
    stock = peft_layer(inputs)
    layer = fastlora.peft.patch(copy.deepcopy(stock))
    results = {}
    for name, module in (("stock", stock), ("fused", layer)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = inputs.x.clone().requires_grad_()
            y = module(x)
        y.backward(inputs.dy.to(y.dtype))
        results[name] = {
            "Y": y.detach(),
            "dX": x.grad,
            "dA": module.lora_A["default"].weight.grad,
            "dB": module.lora_B["default"].weight.grad,
        }
    truth = accuracy.run(fastlora.reference.lora_linear, inputs.map(torch.Tensor.double))
    absolute = accuracy.run(fastlora.reference.lora_linear, inputs.map(lambda t: t.double().abs()))
    for name, mine in results["fused"].items():
        theirs = results["stock"][name]
        assert mine.dtype is theirs.dtype and mine.shape == theirs.shape
        error, allowed = (mine.double() - truth[name]).norm(), (theirs.double() - truth[name]).norm()
        assert error <= 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps * absolute[name].norm()
    assert fused_calls(layer) == 1


def test_set_scale_scale_layer_and_unscale():
    stock, model = twins(torch.float64)
    fastlora.peft.patch(model)
    x = torch.randn(6, 24, dtype=torch.float64)
    for change in (
        lambda layer: layer.set_scale("default", 2),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(),
    ):
        for m in (stock, model):
            change(layer_of(m))
        torch.testing.assert_close(model(x), stock(x))
    assert fused_calls(model) == 9


def test_hot_swapped_tensor_scalings():
    stock, model = twins(torch.float64)
    fastlora.peft.patch(model)
    x = torch.randn(6, 24, dtype=torch.float64)
    for m in (stock, model):
        prepare_model_for_compiled_hotswap(m, target_rank=8)
    assert isinstance(layer_of(model).scaling["default"], torch.Tensor)
    for value in (3.0, 0.25):
        for m in (stock, model):
            layer_of(m).scaling["default"].fill_(value)
            m.zero_grad()
            m(x).square().sum().backward()
        torch.testing.assert_close(model(x), stock(x))
        for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert fused_calls(model) == 12


def test_conv1d_weight_is_a_view():
    layer = layer_of(fastlora.peft.patch(build()), "conv")
    weight = layer._arguments(torch.randn(3, 32))[1]
    assert weight.data_ptr() == layer.base_layer.weight.data_ptr() and weight.shape == (16, 32)


def test_frozen_adapters_and_inputs_without_gradients():
    stock, model = twins(torch.float64)
    fastlora.peft.patch(model)
    x = torch.randn(6, 24, dtype=torch.float64)
    for name in ("lora_A", "lora_B"):
        for m in (stock, model):
            m.zero_grad()
            m.requires_grad_(False)
            getattr(layer_of(m), name)["default"].weight.requires_grad_(True)
            m(x).square().sum().backward()
        mine, theirs = (getattr(layer_of(m), name)["default"].weight.grad for m in (model, stock))
        torch.testing.assert_close(mine, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), stock(x))
