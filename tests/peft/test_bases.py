"""PEFT's layers over quantised bases, and DoRA: stock and patched beside each other."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora.peft
from fastlora.dora import row_norms

bnb = pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "fp4", "int8", "torchao", "torchao int4")
WIDTH, OUT = 128, 192  # whole blocks of 64: others bitsandbytes itself gets wrong on some CPUs


def quantised(kind: str, dtype=torch.float32, compute=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Tanh(), nn.Linear(OUT, WIDTH, bias=False)).to(dtype)
    for name, linear in list(model.named_children()):
        if isinstance(linear, nn.Linear):
            shape = (linear.in_features, linear.out_features, linear.bias is not None)
            if kind in ("nf4", "fp4"):
                packed = bnb.nn.Linear4bit(*shape, compute or dtype, kind == "nf4", kind)
                packed.load_state_dict(linear.state_dict())
                model.set_submodule(name, packed.to("cpu"))
            elif kind == "int8":
                packed = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
                packed.load_state_dict(linear.state_dict())
                model.set_submodule(name, packed.to("cpu"))
            elif "torchao" in kind:
                quantization = pytest.importorskip("torchao.quantization")
                int4 = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
                config = quantization.IntxWeightOnlyConfig(**int4) if "int4" in kind else None
                quantization.quantize_(linear, config or quantization.Int8WeightOnlyConfig())
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind in ("nf4", "fp4"), kind == "int8"
    return model


def build(kind: str, dtype=torch.float32, compute=None, **config) -> PeftModel:
    base = quantised(kind, dtype, compute)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, LoraConfig(**config)).train()


def step(model: nn.Module, x: torch.Tensor, call=None) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = model(x) if call is None else call(x)
    y.float().square().mean().backward()
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def alike(mine: dict, theirs: dict, rtol: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, want in theirs.items():
        got = mine[name]
        assert got.dtype == want.dtype and got.shape == want.shape, name
        assert (got - want).float().norm() <= rtol * want.float().norm(), name


def fused_only(model: nn.Module) -> int:
    report = fastlora.peft.report(model)
    assert report.fallback_calls == 0, str(report)
    return report.fused_calls


X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_as_stock_peft(kind, dtype, dora):
    if kind == "plain" and not dora:
        pytest.skip("test_numbers has it")
    stock, model = build(kind, dtype, use_dora=dora), build(kind, dtype, use_dora=dora)
    fastlora.peft.patch(model)
    alike(step(model, X.to(dtype)), step(stock, X.to(dtype)), TOLERANCE[dtype])
    rounding = 4e-2 if kind == "int8" else 0.0  # bitsandbytes rounds x to 8 bits in eval mode
    if not (kind == "int8" and dora):  # there PEFT's own loses the scales
        alike(step(model.eval(), X.to(dtype)), step(stock.eval(), X.to(dtype)), TOLERANCE[dtype] + rounding)
    step(model.eval(), X.to(dtype))
    assert fused_only(model) >= 4


@pytest.mark.parametrize("kind", ["nf4", "plain"])
def test_dora_with_dropout_drops_as_stock_peft_does(kind):
    stock, model = (build(kind, use_dora=True, lora_dropout=0.4) for _ in range(2))
    fastlora.peft.patch(model)
    alike(step(model, X), step(stock, X), 1e-5)
    assert fused_only(model) == 2


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_that_computes_in_another_dtype(x_dtype):
    stock, model = (build("nf4", torch.float32, torch.bfloat16) for _ in range(2))
    fastlora.peft.patch(model)
    alike(step(model, X.to(x_dtype)), step(stock, X.to(x_dtype)), 2e-2)
    assert fused_only(model) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_autocast(kind, x_dtype, dora):
    dtype = torch.bfloat16 if "torchao" in kind else torch.float32
    stock, model = (build(kind, dtype, torch.bfloat16, use_dora=dora) for _ in range(2))
    fastlora.peft.patch(model)
    x = X.to(dtype if "torchao" in kind else x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        alike(step(model, x), step(stock, x), 3e-2)
    assert fused_only(model) == 2


def test_autocast_into_another_dtype_than_the_base_computes_in_is_pefts():
    stock, model = (build("nf4", torch.float32, torch.float32) for _ in range(2))
    fastlora.peft.patch(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=r"computes in torch.float32"):
        alike(step(model, X), step(stock, X), 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_identity_state_dict_repr_and_the_way_back(kind, dora, tmp_path):
    model = build(kind, use_dora=dora)
    text, objects, state = repr(model), list(model.modules()), model.state_dict()
    kinds = [type(module) for module in objects]
    fastlora.peft.patch(model)
    assert repr(model) == text and all(a is b for a, b in zip(model.modules(), objects, strict=True))
    want = model(X)
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = fastlora.peft.patch(PeftModel.from_pretrained(quantised(kind), tmp_path)).train()
    torch.testing.assert_close(loaded(X), want)
    if kind in ("nf4", "fp4"):  # the others' own pickles do not come back
        twin = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(twin(X), want)
        assert fused_only(twin) == 2
    fastlora.peft.unpatch(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_merge_and_unmerge_are_pefts(kind, dora):
    stock, model = (build(kind, use_dora=dora) for _ in range(2))
    fastlora.peft.patch(model)
    step(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for m in (stock, model):
            m.merge_adapter()
        assert torch.equal(model(X), stock(X))
        for m in (stock, model):
            m.unmerge_adapter()
    alike(step(model, X), step(stock, X), 1e-5)


def test_a_new_weight_gives_dora_new_norms():
    stock, model = build("plain", use_dora=True), build("plain", use_dora=True)
    fastlora.peft.patch(model)
    step(model, X)
    for m in (stock, model):
        with torch.no_grad():
            m.base_model.model[0].base_layer.weight.mul_(1.5)
        m.base_model.model[2].base_layer.weight = nn.Parameter(torch.randn(WIDTH, OUT).sin(), requires_grad=False)
    model.base_model.model[2].base_layer.weight.data.copy_(stock.base_model.model[2].base_layer.weight)
    alike(step(model, X), step(stock, X), 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "torchao", "plain"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind, reentrant):
    model = fastlora.peft.patch(build(kind, use_dora=True, lora_dropout=0.2))
    want = step(model, X)
    alike(step(model, X, lambda x: checkpoint(model, x, use_reentrant=reentrant)), want, 1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_compiled(kind, dora):
    torch._dynamo.reset()
    stock, model = (build(kind, use_dora=dora) for _ in range(2))
    compiled = torch.compile(fastlora.peft.patch(model), backend="aot_eager", fullgraph=True)
    kept: list[torch.Tensor] = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        found = step(model, X, compiled)
    alike(found, step(stock, X), 1e-5)
    dense = [t for t in kept if t.is_floating_point() and t.itemsize > 1 and t.numel() == WIDTH * OUT]
    assert len(dense) == (2 if kind == "plain" else 0)  # a quantised base is not kept dequantised


def test_doras_norms_by_inductor():
    torch._dynamo.reset()
    weight, A, B = torch.randn(OUT, WIDTH), torch.randn(4, WIDTH), torch.randn(OUT, 4)
    compiled = torch.compile(row_norms, fullgraph=True)
    torch.testing.assert_close(compiled(weight, A, B, 3.0), row_norms(weight, A, B, 3.0))


def test_double_backward_through_dora():
    layer = fastlora.peft.patch(build("nf4", use_dora=True)).base_model.model[0]
    stock = build("nf4", use_dora=True).base_model.model[0]
    found = []
    for l in (layer, stock):
        x = X[0].clone().requires_grad_()
        (dx,) = torch.autograd.grad(l(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        magnitude = l.lora_magnitude_vector["default"].weight
        found.append({"x": x.grad, "A": l.lora_A["default"].weight.grad, "magnitude": magnitude.grad})
    alike(*found, 1e-4)


def test_backward_twice_through_one_dora_graph():
    model = fastlora.peft.patch(build("plain", use_dora=True))
    y = model(X).square().sum()
    y.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    y.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, 2 * gradient, msg=name)


def test_decoding_on_a_gpu_is_left_to_bitsandbytes():
    from fastlora.peft import reasons

    layer = fastlora.peft.patch(build("nf4")).base_model.model[0]
    on_gpu = type("OnGPU", (torch.Tensor,), {"is_cpu": False})
    few, many = (torch.randn(rows, WIDTH).as_subclass(on_gpu) for rows in (7, 8))
    with torch.no_grad():
        assert reasons._decodes(layer, few) and not reasons._decodes(layer, many)
    assert not reasons._decodes(layer, few)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_llama_in_four_bits_trains_as_stock_does(dora, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    def losses(dtype, patch):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).bfloat16().to(dtype)  # the same 4 bits in each
        for name, linear in list(model.named_modules()):
            if type(linear) is nn.Linear and name != "lm_head":
                packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, dtype, True, "nf4")
                packed.load_state_dict(linear.state_dict())
                model.set_submodule(name, packed.to("cpu"))
        model.is_loaded_in_4bit = True
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora)).train()
        model.enable_input_require_grads()
        if patch:
            fastlora.peft.patch(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        ids, found = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1)), []
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert not patch or fused_only(model) == 8 * 14
        return torch.tensor(found)

    ours, stock = losses(dtype, True), losses(dtype, False)
    assert ours[-1] < ours[0] - 0.3
    if dtype is torch.float32:
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=0)
    else:
        truth = losses(torch.float32, False)
        assert (ours - truth).norm() <= 2 * (stock - truth).norm() + 8**0.5 * torch.finfo(dtype).eps


def test_what_changes_after_a_fused_call_is_seen():
    model = fastlora.peft.patch(build("nf4", use_dora=True))
    layer = model.base_model.model[0]
    layer(X)
    magnitude = layer.lora_magnitude_vector["default"]
    handle = magnitude.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="lora_magnitude_vector has hooks"):
        layer(X)
    handle.remove()
    base = layer.base_layer
    state = base.weight.quant_state
    base.weight.quant_state = base.quant_state = None
    with pytest.warns(UserWarning, match="was not yet"), pytest.raises(ValueError, match="quant_state"):
        layer(X)
    base.weight.quant_state = base.quant_state = state
    layer(X)
    assert fastlora.peft.report(layer)[""].fused_calls == 2
