"""PEFT's other starts and variants: those that stay plain layers are fused, experts are left alone with the reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import build, layer_of
from peft import LoftQConfig, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

import fastlora
import fastlora.peft

X = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "gaussian", "orthogonal"])
def test_starts(init):
    config = {"init_lora_weights": init, "use_rslora": True, "target_modules": ["first"], "r": 4}
    if init == "loftq":
        pytest.importorskip("scipy")
        if not torch.cuda.is_available():
            pytest.skip("PEFT computes LoftQ's start on a GPU only")
        config["loftq_config"] = LoftQConfig(loftq_bits=4)
    stock = build(**config)
    model = fastlora.peft.patch(copy.deepcopy(stock))
    optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), 0.1) for m in (stock, model)]
    for _ in range(3):
        losses = [m(X).square().mean() for m in (stock, model)]
        torch.testing.assert_close(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(layer_of(model).lora_B["default"].weight, layer_of(stock).lora_B["default"].weight)
    report = fastlora.peft.report(model)
    assert (report.fused_calls, report.fallback_calls) == (3, 0)


def test_pefts_parameter_groups_of_lora_plus_serve_inject():
    model = fastlora.inject(torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 24)), r=2)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(layer.lora_A)] == 1e-3 and rates[id(layer.lora_B)] == 16e-3 for layer in model)


def test_experts_are_left_alone_with_the_reason():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=2, **sizes)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
        stock = get_peft_model(MixtralForCausalLM(config), wanted)
    model, ids = fastlora.peft.patch(copy.deepcopy(stock)), torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, stock(ids).logits)
    report = fastlora.peft.report(model)
    said = {name: str(entry) for name, entry in report.items() if "experts" in name}
    assert len(said) == 2 and all("ParamWrapper" in entry and "reads itself" in entry for entry in said.values())
    assert report.fused_calls == 1
