"""Every case in which PEFT's own forward runs: the same numbers as stock, the reason in `report`, one warning."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from conftest import build, layer_of
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

import fastlora.peft

X = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


def _disabled(model):
    layer_of(model).enable_adapters(False)


def _merged(model):
    layer_of(model).merge()


def _none_active(model):
    layer_of(model)._active_adapter = "absent"


def _several_active(model):
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(target_modules=["first"], init_lora_weights=False))
    layer_of(model).set_adapter(["default", "other"])


def _lora_bias(model):
    up = layer_of(model).lora_B["default"]
    up.bias = nn.Parameter(torch.ones(up.out_features))


def _trainable_weight(model):
    layer_of(model).base_layer.weight.requires_grad_(True)


def _hook(part, register):
    def change(model):
        getattr(_part(model, part), register)(lambda *args: None)

    return change


def _part(model, part):
    found = getattr(layer_of(model), part)
    return found if part == "base_layer" else found["default"]


def _replaced_forward(part):
    def change(model):
        module = _part(model, part)
        module.forward = types.MethodType(type(module).forward, module)

    return change


def _accelerate(part):
    def change(model):
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(_part(model, part), ModelHook())

    return change


def _parametrized(part):
    def change(model):
        nn.utils.parametrize.register_parametrization(_part(model, part), "weight", nn.Identity())

    return change


def _other_type(part):
    class Mine(nn.Linear):
        pass

    def change(model):
        _part(model, part).__class__ = Mine

    return change


def _other_dropout(model):
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


def _in_place_dropout(model):
    layer_of(model).lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def _vector_scaling(model):
    layer_of(model).scaling["default"] = torch.full((1,), 3.0)


def _trainable_scaling(model):
    layer_of(model).scaling["default"] = torch.tensor(3.0, requires_grad=True)


class Packed(torch.Tensor):
    pass


def _tensor_subclass_weight(model):
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Packed), requires_grad=False)


def _zero3(model):
    layer_of(model).lora_A["default"].weight.ds_id = 1


def _flat_unit(model):  # what FSDP 1 leaves of a parameter: a view of its flat one
    base = layer_of(model).base_layer
    weight = base.weight.detach()
    del base.weight
    base.weight = weight


CASES = {
    "adapters are disabled": _disabled,
    "adapters are merged": _merged,
    "no active adapter": _none_active,
    "several adapters are active": _several_active,
    "lora_bias": _lora_bias,
    "base weight is trainable": _trainable_weight,
    **{
        f"{part} has hooks#{register}": _hook(part, register)
        for part in ("base_layer", "lora_A", "lora_B", "lora_dropout")
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    },
    **{f"{part}.forward is replaced": _replaced_forward(part) for part in ("base_layer", "lora_A", "lora_B")},
    **{f"{part} is hooked by accelerate": _accelerate(part) for part in ("base_layer", "lora_A", "lora_B")},
    **{f"{part} is a torch.nn.utils.parametrize": _parametrized(part) for part in ("base_layer", "lora_A", "lora_B")},
    **{f"{part} is a {__name__}": _other_type(part) for part in ("base_layer", "lora_A", "lora_B")},
    "lora_dropout is a torch.nn.modules.dropout.AlphaDropout": _other_dropout,
    "lora_dropout works in place": _in_place_dropout,
    "scaling has shape (1,)": _vector_scaling,
    "scaling asks for a gradient": _trainable_scaling,
    "sharded or quantised: base weight is a Packed": _tensor_subclass_weight,
    "sharded: lora_A is a ZeRO-3 parameter": _zero3,
    "sharded or quantised: base weight is a Tensor, not a plain parameter": _flat_unit,
}


def _run(model, x, **arguments):
    x = x.clone().requires_grad_()
    y = layer_of(model)(x, **arguments)
    y.square().sum().backward()
    return y.detach(), x.grad, layer_of(model).lora_A["default"].weight.grad


@pytest.mark.parametrize("reason", CASES)
@pytest.mark.parametrize("called_before", [False, True], ids=["at once", "after a fused call"])
def test_exit(reason, called_before):
    stock, model = build(), build()
    fastlora.peft.patch(model)
    if called_before:
        _run(model, X)
        assert fastlora.peft.report(model)["base_model.model.first"].fused_calls == 1
        model.zero_grad()
    CASES[reason](stock)
    CASES[reason](model)
    reason = reason.split("#")[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = _run(model, X)
        layer_of(model)(X)
    ours = [w for w in said if issubclass(w.category, fastlora.errors.FastLoRAWarning)]
    assert len(ours) == 1 and reason in str(ours[0].message) and "first" in str(ours[0].message)
    for mine, theirs in zip(got, _run(stock, X), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    entry = fastlora.peft.report(model)["base_model.model.first"]
    assert reason in entry and not entry.fused
    assert (entry.fused_calls, entry.fallback_calls) == (int(called_before), 2)


def test_bias_from_the_config():
    stock, model = (build(target_modules=["first"], lora_bias=True) for _ in range(2))
    fastlora.peft.patch(model)
    with pytest.warns(UserWarning, match="lora_bias"):
        got = _run(model, X)
    for mine, theirs in zip(got, _run(stock, X), strict=True):
        assert torch.equal(mine, theirs)
    assert "lora_bias" in fastlora.peft.report(model)["base_model.model.first"]


def test_adapter_names():
    stock, model = build(), fastlora.peft.patch(build())
    names = ["default", "__base__", "default"]
    with pytest.warns(UserWarning, match="called with adapter_names"):
        got = layer_of(model.eval())(X, adapter_names=names)
    assert torch.equal(got, layer_of(stock.eval())(X, adapter_names=names))
    entry = fastlora.peft.report(model)["base_model.model.first"]
    assert entry.fallback_calls == 1 and entry.fused  # a call without them would be fused


@pytest.mark.skipif(not hasattr(lora.layer, "VARIANT_KWARG_KEYS"), reason="this PEFT has no activated LoRA")
def test_activated_lora_arguments():
    stock, model = build(), fastlora.peft.patch(build())
    with pytest.warns(UserWarning, match="called with alora_offsets"):
        got = layer_of(model)(X, alora_offsets=[1, 2, 3])
    torch.testing.assert_close(got, layer_of(stock)(X), rtol=0, atol=0)


def test_hooks_for_all_modules():
    model = fastlora.peft.patch(build())
    layer_of(model)(X)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.warns(UserWarning, match="hooks for all modules"):
            layer_of(model)(X)
    finally:
        handle.remove()
    layer_of(model)(X)
    entry = fastlora.peft.report(model)["base_model.model.first"]
    assert (entry.fused_calls, entry.fallback_calls) == (2, 1)


def test_function_transforms():
    layer = layer_of(fastlora.peft.patch(build()))
    layer(X)
    with pytest.warns(UserWarning, match="function transform"):
        got = torch.func.vmap(layer)(X)
    torch.testing.assert_close(got, layer(X))
    _, tangent = torch.func.jvp(layer, (X,), (torch.ones_like(X),))
    assert tangent.shape == got.shape


def test_tracing():
    layer = layer_of(fastlora.peft.patch(build()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, X, check_trace=False)
        torch.testing.assert_close(traced(X), layer(X))
    assert fastlora.peft.report(layer)[""].fallback_calls == 1


def test_dtypes_that_peft_refuses_stay_pefts_errors():
    stock, model = build(), fastlora.peft.patch(build())
    for m in (stock, model):
        with pytest.raises(RuntimeError, match="dtype"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer_of(m)(X.double())
    entry = fastlora.peft.report(model)["base_model.model.first"]
    assert "x is torch.float64 and the base weight torch.float32" in entry.reasons


def test_cast_switched_off():
    model = fastlora.peft.patch(build(torch.bfloat16))
    from peft.helpers import disable_input_dtype_casting

    layer_of(model)(X.bfloat16())
    said = pytest.warns(UserWarning, match="switched off")
    with disable_input_dtype_casting(model), said, pytest.raises(RuntimeError):
        layer_of(model)(X.bfloat16())


def test_an_exit_ends_when_its_cause_does():
    model = fastlora.peft.patch(build())
    handle = layer_of(model).lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="lora_A has hooks"):
        layer_of(model)(X)
    handle.remove()
    layer_of(model)(X)
    assert fastlora.peft.report(model)["base_model.model.first"].fused_calls == 1


def test_a_layer_whose_own_forward_is_replaced_says_so():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = build()
    add_hook_to_module(layer_of(model), ModelHook())
    fastlora.peft.patch(model)
    want = layer_of(model)(X)
    assert torch.equal(want, layer_of(build())(X))
    assert "own forward is replaced" in fastlora.peft.report(model)["base_model.model.first"]
