"""Adapters with PEFT as the other side: it loads ours, we load its own, number for number."""

from __future__ import annotations

import copy

import pytest
import torch
from small_adapter import IDS, adapter_entries, refused, shaken
from torch import nn

from fastlora import FusedLoRALinear, inject, load_adapter, save_adapter


def distilbert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


PAIRS = [
    (distilbert, {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}),
    (
        distilbert,
        {"target_modules": "all-linear", "modules_to_save": ["classifier"], "exclude_modules": ["pre_classifier"]},
    ),
    (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"]}),
    (gpt2, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    (gpt2, {"target_modules": ["c_fc", "lm_head"]}),
    (
        llama,
        {
            "task_type": "CAUSAL_LM",
            "target_modules": r".*\.(q|v)_proj",
            "rank_pattern": {"layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
            "use_rslora": True,
        },
    ),
    (llama, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]}),
    (llama, {"target_modules": "all-linear", "use_dora": True}),
    (gpt2, {"target_modules": ["c_attn"], "use_dora": True}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "wanted"), PAIRS)
class TestWithPeft:
    def test_peft_loads_ours(self, tmp_path, make, wanted):
        peft = pytest.importorskip("peft")
        model = shaken(inject(make(), r=4, lora_alpha=6, **wanted))
        save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}
        found = {
            n for n, layer in theirs.base_model.model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
        assert found == set(layers)
        for name, layer in layers.items():
            other = theirs.base_model.model.get_submodule(name)
            assert torch.equal(other.lora_A["default"].weight, layer.lora_A)
            assert torch.equal(other.lora_B["default"].weight, layer.lora_B)
            if layer.use_dora:
                assert torch.equal(other.lora_magnitude_vector["default"].weight, layer.lora_magnitude_vector)
            assert other.scaling["default"] == layer.scaling
        written = {key for key in adapter_entries(tmp_path) if ".lora_" not in key}
        kept = peft.get_peft_model_state_dict(theirs)
        for key in written:
            assert torch.equal(kept[key], model.state_dict()[key.removeprefix("base_model.model.")])
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=2e-6)

    def test_we_load_pefts(self, tmp_path, make, wanted):
        peft = pytest.importorskip("peft")
        given = copy.deepcopy(wanted)
        theirs = shaken(peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **given)))
        theirs.save_pretrained(tmp_path / "theirs")
        model = load_adapter(make(), tmp_path / "theirs").eval()
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=2e-6)
        save_adapter(model, tmp_path / "ours")
        ours, original = adapter_entries(tmp_path / "ours"), adapter_entries(tmp_path / "theirs")
        assert set(original) - set(ours) <= {"base_model.model.lm_head.base_layer.weight"}
        assert all(torch.equal(ours[key], original[key]) for key in ours)
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        assert torch.equal(again(IDS).logits, theirs(IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_head_that_peft_saved_with_another_base_weight(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in adapter_entries(tmp_path)
    load_adapter(llama(), tmp_path)
    other = llama()
    nn.init.zeros_(other.lm_head.weight)
    assert "another base weight" in refused(tmp_path, other)


@pytest.mark.filterwarnings("ignore")
def test_pefts_float32_adapters_over_a_16_bit_base(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = shaken(peft.get_peft_model(gpt2().bfloat16(), peft.LoraConfig(r=4, target_modules=["c_attn"])))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(gpt2().bfloat16(), tmp_path)
    for key, value in adapter_entries(tmp_path).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(model.get_parameter(name), value) and value.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_over_four_bits_both_ways(tmp_path, use_dora):
    peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")

    def base():
        torch.manual_seed(0)
        packed = bitsandbytes.nn.Linear4bit(64, 96, True, torch.float32, True, "nf4")
        packed.load_state_dict(nn.Linear(64, 96).state_dict())
        model = nn.Sequential(packed.to("cpu"), nn.Tanh(), nn.Linear(96, 8))
        model.is_loaded_in_4bit = True
        return model

    x = torch.randn(5, 64)
    model = shaken(inject(base(), r=4, target_modules=["0"], use_dora=use_dora))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").train()  # in eval mode its base rounds x
    assert type(theirs.base_model.model[0]).__name__ == "Linear4bit"
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(load_adapter(base(), tmp_path / "theirs")(x), model(x))
