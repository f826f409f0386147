"""Layers that read one x: who computes for whom, and when each computes alone."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import siblings
from fastlora.linear import EagerLoRALinear, FusedLoRALinear
from fastlora.siblings import Siblings

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _on_cpus_too(monkeypatch):
    monkeypatch.setattr(siblings, "on", True)


@pytest.fixture
def computed(monkeypatch):
    """One entry for each time that layers were computed together: how many."""
    calls, real = [], siblings.together

    def together(x, projections, p):
        ys = real(x, projections, p)
        calls.extend([] if ys is None else [len(projections)])
        return ys

    monkeypatch.setattr(siblings, "together", together)
    return calls


def trio(p=0.0, kinds=(FusedLoRALinear,) * 3):
    torch.manual_seed(0)
    layers = [kind(24, n, r=4, lora_dropout=p) for kind, n in zip(kinds, (24, 16, 16), strict=True)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.lora_B)
    group = Siblings(tuple(zip(layers, "qkv", strict=True)))
    for layer in layers:
        layer.__dict__["_siblings"] = group
    return layers


def alone(layers):
    found = copy.deepcopy(layers)
    for layer in found:
        layer.__dict__.pop("_siblings")
    return found


def llama(**keywords):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, **keywords,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config)


def distilbert():
    config = transformers.DistilBertConfig(
        dim=32, hidden_dim=64, n_layers=1, n_heads=4, vocab_size=50, dropout=0.0, attention_dropout=0.0
    )
    return transformers.DistilBertModel(config)


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (llama, (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) * 2),
        (bert, (("query", "key", "value"),)),
        (distilbert, (("q_lin", "k_lin", "v_lin"),)),
    ],
)
def test_inject_finds_them_and_the_model_computes_the_same(make, names, computed):
    model = fastlora.inject(make(), r=4)
    found = {layer._siblings for layer in model.modules() if getattr(layer, "_siblings", None)}
    assert sorted(tuple(n.split(".")[-1] for _, n in group.members) for group in found) == sorted(names)
    for layer in model.modules():
        if isinstance(layer, FusedLoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
    lonely = copy.deepcopy(model)
    for layer in lonely.modules():
        layer.__dict__.pop("_siblings", None)
    results = []
    for one in (model, lonely):
        y = one(torch.arange(12).view(2, 6))[0]
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in one.parameters() if p.requires_grad)])
    assert len(computed) == len(names)  # the lonely one none
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_explain_and_report_name_the_group():
    model = fastlora.inject(llama(), r=4)
    block, x = model.model.layers[0].self_attn, torch.randn(3, 32)
    assert "same x" not in str(fastlora.explain(block.k_proj, x))  # no call yet
    block.q_proj(x)
    assert "model.layers.0.self_attn.v_proj" in str(fastlora.explain(block.k_proj, x))
    assert "same x" not in str(fastlora.explain(block.o_proj, x))
    block.k_proj.merge()
    block.q_proj(x.clone())
    assert "same x" not in str(fastlora.explain(block.q_proj, x))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_peft_layers_hand_over_and_are_counted(p, computed):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_dropout=p, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
    )
    model = fastlora.peft.patch(peft.get_peft_model(llama(), config))
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        model(ids)[0].sum().backward()
    assert computed == [3] * 2  # by the second forward each layer is known
    report = fastlora.peft.report(model)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert report[name].together == tuple(name.replace("q_", which) for which in ("q_", "k_", "v_"))
    assert report.fused_calls == 12 and "together: " in str(report)
    attention = model.base_model.model.model.layers[0].self_attn
    fastlora.peft.unpatch(attention.v_proj)
    assert attention.q_proj(torch.randn(3, 32)).shape == (3, 32) and computed[-1] == 2  # of those that are left
    fastlora.peft.unpatch(model)
    assert not any("_siblings" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_first_called_computes_all(p, computed):
    layers = trio(p)
    others = alone(layers)
    torch.manual_seed(3)
    got = [layer(X) for layer in layers]
    torch.manual_seed(3)
    assert all(torch.equal(a, other(X)) for a, other in zip(got, others, strict=True))
    assert computed == [3] and layers[0]._siblings._local.held is None


def test_another_tensor_and_a_changed_one_compute_alone(computed):
    q, k, v = trio()
    others = alone([q, k, v])
    x = X.clone()
    q(x)
    assert torch.equal(k(x.clone()), others[1](x))  # equal, but not the same
    x = X.clone()
    q(x)
    x.add_(1.0)
    assert torch.equal(k(x), others[1](x))


@pytest.mark.parametrize(
    "change",
    ["lora_A", "weight", "data", "x.data", "scaling", "grad mode", "eval", "frozen", "bfloat16", "no inference"],
)
def test_what_has_changed_since_is_computed_again(change):
    q, k, _ = trio(p=0.3 if change == "eval" else 0.0)
    x = X.clone()
    with torch.inference_mode(change == "no inference"):
        q(x)
    if change in ("lora_A", "weight"):
        with torch.no_grad():
            getattr(k, change).mul_(2.0)
    elif change == "scaling":
        k.scaling = 5.0
    elif change == "eval":
        k.eval()
    elif change == "frozen":
        k.requires_grad_(False)
    elif change == "data":
        k.weight.data = k.weight.data * 2.0
    elif change == "x.data":
        x.data = x.data * 2.0
    learns, cast = change not in ("grad mode", "no inference"), change == "bfloat16"
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y, own = k(x), alone([k])[0](x)
    assert torch.equal(y, own) and y.requires_grad == own.requires_grad and not y.is_inference()


def test_who_never_comes_leaves_the_group(computed):
    q, k, v = trio()
    for _ in range(4):
        x = X.clone()
        q(x), k(x)
    assert computed == [3, 3, 2, 2]
    assert [name for _, name in q._siblings.members] == ["q", "k"]
    for _ in range(4):
        v(X)  # alone
    assert computed == [3, 3, 2, 2]


def test_what_cannot_be_computed_together_is_tried_ever_more_rarely(computed, monkeypatch):
    layers, tried = trio(), []
    layers[1].merge()
    real = FusedLoRALinear._projection
    monkeypatch.setattr(FusedLoRALinear, "_projection", lambda *a: tried.append(1) or real(*a))
    for _ in range(1000):
        x = X.clone()
        [layer(x) for layer in layers]
    assert len(tried) == 3 * 10 and computed == []
    layers[1].unmerge()
    for _ in range(300):
        x = X.clone()
        ys = [layer(x) for layer in layers]
    assert set(computed) == {3} and len(tried) < 3 * 10 + 5 * len(computed) + 3
    assert all(torch.equal(y, own(x)) for y, own in zip(ys, alone(layers), strict=True))


def test_weights_made_in_inference_mode(computed):
    with torch.inference_mode():
        layers = trio()
    with torch.no_grad():
        [layer(X) for layer in layers]
    assert computed == []


def test_one_call_cut_short_changes_nothing(computed):
    q, k, v = trio()
    for _ in range(3):
        q(X)  # an error, say, before k and v
        x = X.clone()
        q(x), k(x), v(x)
    assert computed == [3] * 6


def test_nothing_is_kept_for_longer_than_the_next_call():
    q, k, v = trio()
    x = X.clone()
    left = weakref.ref(x)
    q(x)
    del x
    y = X.clone()
    q(y), k(y), v(y)
    gc.collect()
    assert left() is None and q._siblings._local.held is None


def test_each_thread_has_its_own(computed):
    q, k, v = trio()
    others, wrong = alone([q, k, v]), []

    def work(seed):
        for i in range(50):
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(100 * seed + i))
            for layer, other in zip((q, k, v), others, strict=True):
                # not to the bit: F.linear itself gives others in a new thread when the number of threads was changed
                if not torch.allclose(layer(x), other(x), atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and computed == [3] * 200


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_the_same(reentrant, computed):
    layers = trio(p=0.3)

    def run(x):
        return sum(layer(x).square().sum() for layer in layers)

    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    x = X.clone().requires_grad_()
    torch.manual_seed(2)
    plain = torch.autograd.grad(run(x), [x, *parameters])
    for _ in range(3):
        x.grad = None
        for p in parameters:
            p.grad = None
        torch.manual_seed(2)
        checkpoint(run, x, use_reentrant=reentrant).backward()
        for a, b in zip(plain, [x, *parameters], strict=True):
            torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-4)
    assert computed == [3] * (7 if reentrant else 1)


@pytest.mark.parametrize("which", [0, 1])
def test_a_checkpoint_of_one_of_them(which):
    layers, x = trio(), X.clone().requires_grad_()
    want = torch.autograd.grad(sum(layer(x).square().sum() for layer in alone(layers)), x)[0]
    for turn in range(4):
        other = X + turn
        layers[0](other), layers[1](other), layers[2](other)
        ys = [checkpoint(one, x, use_reentrant=False) if i == which else one(x) for i, one in enumerate(layers)]
        got = torch.autograd.grad(sum(y.square().sum() for y in ys), x)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_hooks_on_each_module_run(computed):
    layers, seen = trio(), []
    for name, layer in zip("qkv", layers, strict=True):
        layer.register_forward_hook(lambda *a, name=name: seen.append(f"after {name}"))
    x = X.clone()
    [layer(x) for layer in layers]
    assert seen == [f"after {name}" for name in "qkv"] and computed == [3]


def test_what_a_pre_hook_brings_is_used(computed):
    q, k, v = trio()
    real, k.weight.data = k.weight.data, torch.zeros_like(k.weight)  # as offloading does
    k.register_forward_pre_hook(lambda module, given: setattr(module.weight, "data", real))
    v.register_forward_pre_hook(lambda module, given: (given[0] * 2.0,))
    q(X)
    ys, (_, k, v) = [k(X), v(X)], alone([q, k, v])
    k.weight.data = real
    assert torch.equal(ys[0], k.forward(X)) and torch.equal(ys[1], v.forward(X * 2.0)) and computed == []


@pytest.mark.parametrize("kind", ["eager", "merged", "dora", "dropouts that differ", "inference"])
def test_a_layer_that_is_more_than_lora_linear_keeps_all_alone(kind, computed):
    layers = trio(kinds=(FusedLoRALinear, EagerLoRALinear, FusedLoRALinear)) if kind == "eager" else trio()
    if kind == "merged":
        layers[1].merge()
    elif kind == "dora":
        layers[1]._set_base(None)
        layers[1].__dict__["_special"], layers[1].use_dora = True, False
    elif kind == "dropouts that differ":
        layers[1].lora_dropout = 0.5
    with torch.inference_mode(kind == "inference"):
        x = X.clone()
        for layer in layers:
            layer(x)
    assert computed == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_groups_of_its_own(how, computed):
    model = fastlora.inject(llama(), r=4)
    model(torch.arange(4).view(1, 4))
    computed.clear()
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    other(torch.arange(4).view(1, 4))
    assert computed == [3, 2] * 2
    layer = other.model.layers[0].self_attn.q_proj
    assert layer._siblings is not model.model.layers[0].self_attn.q_proj._siblings
    assert any(one is layer for one, _ in layer._siblings.members)


def test_a_copy_of_one_layer_has_no_group():
    layer = fastlora.inject(llama(), r=4).model.layers[0].self_attn.q_proj
    other = copy.deepcopy(layer)
    assert layer._siblings is not None and other._siblings is None
    assert torch.equal(other(torch.ones(3, 32)), layer(torch.ones(3, 32)))


def test_cross_attention_is_no_group():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
    )  # fmt: skip
    model = fastlora.inject(transformers.BartModel(config), r=4)
    assert not any("_siblings" in layer.__dict__ for layer in model.modules())


def test_a_compiled_model_computes_each_alone(computed):
    model = fastlora.inject(llama(), r=4)
    block = model.model.layers[0].mlp
    x = torch.randn(2, 32)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))
    assert computed == [2]  # the second call's


def test_on_a_cpu_each_is_computed_alone(computed, monkeypatch):
    monkeypatch.setattr(siblings, "on", False)
    layers = trio()
    for layer in layers:
        layer(X)
    assert computed == [] and "same x" not in str(fastlora.explain(layers[0], X))
