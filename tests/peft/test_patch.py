"""What patching changes (the arithmetic) and what it does not (everything else)."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import peft
import pytest
import torch
from conftest import Net, build, layer_of, twins
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

import fastlora
import fastlora.peft
from fastlora.peft import FusedLinear, patching

X = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))


def test_identity_state_dict_repr_config_and_hooks_stay():
    model = build()
    layers, text, config = dict(model.named_modules()), repr(model), copy.deepcopy(model.peft_config)
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    calls = []
    layer_of(model).register_forward_hook(lambda *a: calls.append("after"))
    layer_of(model).register_forward_pre_hook(lambda *a: calls.append("before"))
    want = model(X)
    calls.clear()

    assert fastlora.peft.patch(model) is model
    assert all(layers[name] is module for name, module in model.named_modules())
    assert repr(model) == text and model.peft_config == config
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][0] and torch.equal(tensor, state[name][1])
    torch.testing.assert_close(model(X), want)
    assert calls == ["before", "after"]
    assert isinstance(layer_of(model), lora.Linear) and type(layer_of(model)) is FusedLinear


def test_nothing_global_is_patched():
    before = {name: id(value) for name, value in vars(lora.Linear).items()}
    other = build()
    fastlora.peft.patch(build())(X)
    assert {name: id(value) for name, value in vars(lora.Linear).items()} == before
    assert type(layer_of(other)) is lora.Linear


def test_unpatch_is_the_way_back():
    model = build()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    fastlora.peft.patch(fastlora.peft.patch(model))(X)
    assert fastlora.peft.report(model).fused_calls == 3
    assert fastlora.peft.unpatch(model) is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(type(layer_of(model, name)) is lora.Linear for name in ("first", "conv", "last"))
    assert set(fastlora.peft.report(model).values()) == {"not patched"}


def test_a_single_layer_and_a_second_patch_keep_their_counts():
    layer = layer_of(build())
    assert fastlora.peft.patch(layer) is layer
    layer(X)
    fastlora.peft.patch(layer)
    assert fastlora.peft.report(layer)[""].fused_calls == 1


def test_subclasses_are_left_alone():
    class Quantised(lora.Linear):
        pass

    model = build()
    layer_of(model).__class__ = Quantised
    fastlora.peft.patch(model)
    assert type(layer_of(model)) is Quantised and type(layer_of(model, "conv")) is FusedLinear
    entry = fastlora.peft.report(model)["base_model.model.first"]
    assert "left alone" in entry and "Quantised" in entry and not entry.fused


def test_report_names_the_path_and_counts_calls(cpu_path):
    model = fastlora.peft.patch(build())
    assert all("no call" in entry and entry.fused for entry in fastlora.peft.report(model).values())
    model(X)
    model(X)
    with model.disable_adapter(), pytest.warns(UserWarning, match="disabled"):
        model(X)
    report = fastlora.peft.report(model)
    assert set(report) == {f"base_model.model.{name}" for name in ("first", "conv", "last")}
    for entry in report.values():
        assert entry == cpu_path and entry.fused
        assert (entry.fused_calls, entry.fallback_calls) == (2, 1)
        assert entry.reasons == {"adapters are disabled": 1}
    assert (report.fused_calls, report.fallback_calls) == (6, 3)
    assert "6 fused calls, 3 by PEFT" in str(report) and "1 x adapters are disabled" in str(report)


def test_explain_answers_for_a_patched_layer(cpu_path):
    layer = layer_of(fastlora.peft.patch(build()))
    assert fastlora.explain(layer, X).path == cpu_path
    layer.enable_adapters(False)
    assert "disabled" in fastlora.explain(layer, X).reason


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_count_their_own_calls(how):
    model = fastlora.peft.patch(build())
    want = model(X)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert fastlora.peft.report(twin).fused_calls == 0
    assert torch.equal(twin(X), want)
    assert fastlora.peft.report(twin).fused_calls == 3 and fastlora.peft.report(model).fused_calls == 3
    with torch.no_grad():
        layer_of(twin).lora_B["default"].weight.zero_()
    assert not torch.equal(twin(X), want) and torch.equal(model(X), want)


def test_saved_and_loaded_and_a_second_adapter(tmp_path):
    stock, model = twins()
    fastlora.peft.patch(model)
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "fused")
    written = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("stock", "fused")]
    assert written[0] == written[1]
    configs = [json.loads((tmp_path / kind / "adapter_config.json").read_text()) for kind in ("stock", "fused")]
    for config in configs:
        config["target_modules"].sort()  # a set in memory, whose order PEFT leaves to chance
    assert configs[0] == configs[1]
    torch.manual_seed(0)
    loaded = fastlora.peft.patch(PeftModel.from_pretrained(Net(), tmp_path / "fused"))
    want = stock.eval()(X)
    torch.testing.assert_close(loaded(X), want)
    loaded.load_adapter(tmp_path / "stock", adapter_name="other")
    fastlora.peft.patch(loaded)
    loaded.set_adapter("other")
    torch.testing.assert_close(loaded(X), want)
    report = fastlora.peft.report(loaded)
    assert (report.fused_calls, report.fallback_calls) == (6, 0)
    loaded.delete_adapter("default")
    torch.testing.assert_close(loaded(X), want)


def test_merge_and_unload_and_disable_adapter_are_plain_pefts():
    stock, model = twins()
    fastlora.peft.patch(model)
    model(X)
    with model.disable_adapter(), stock.disable_adapter(), pytest.warns(UserWarning, match="disabled"):
        assert torch.equal(model(X), stock(X))
    stock.merge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        assert torch.equal(model(X), stock(X))
    stock.unmerge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), stock(X))
    plain, merged = stock.merge_and_unload(), model.merge_and_unload()
    assert repr(merged) == repr(plain) and not any(isinstance(m, lora.Linear) for m in merged.modules())
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])


def test_an_unknown_release_is_named_and_known_ones_are_silent(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.peft.patch(build())
        for version in ("0.17.0", "0.19.2.dev0", "0.21.2"):
            patching._check_version(version)
    for version in ("0.16.0", "0.22.0", "1.0", "unknown"):
        with pytest.warns(UserWarning, match="0.17 to 0.21"):
            patching._check_version(version)
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match="0.99.0"):
        fastlora.peft.patch(build())


def test_mistakes_are_named():
    for function in (fastlora.peft.patch, fastlora.peft.unpatch, fastlora.peft.report):
        with pytest.raises(TypeError, match="module is a dict"):
            function({})
    with pytest.warns(UserWarning, match="found no peft.tuners.lora.Linear"):
        fastlora.peft.patch(nn.Sequential(nn.Linear(2, 2)))


def test_all_modules_of_a_transformers_model_are_found(cpu_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
    model = get_peft_model(
        model, LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    )
    ids = torch.arange(10)[None]
    want = model.eval()(ids).logits
    fastlora.peft.patch(model)
    torch.testing.assert_close(model(ids).logits, want)
    report = fastlora.peft.report(model)
    assert len(report) == 8 and report.fused_calls == 8 and set(report.values()) == {cpu_path}
