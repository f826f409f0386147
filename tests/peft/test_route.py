"""Several of PEFT's adapters in one batch, in training, where PEFT itself refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastlora.peft

NAMES = ["a", "b", None, "b", "a"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.k(torch.tanh(self.q(x)))))


def build(patched=True, **settings):
    torch.manual_seed(0)
    first = LoraConfig(r=4, target_modules=["q", "k"], modules_to_save=["head"], init_lora_weights=False, **settings)
    model = get_peft_model(Net(), first, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=3, target_modules=["q"], modules_to_save=["head"],
                                      init_lora_weights=False))  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".a." in name or ".b." in name)
    return fastlora.peft.patch(model) if patched else model


def test_peft_itself_refuses_to_train_so():
    with pytest.raises(ValueError, match="training mode"):
        build().train()(torch.randn(5, 12), adapter_names=["a"] * 5)


def test_outputs_are_peft_s_own():
    x = torch.randn(5, 7, 12)
    model, stock = build().eval(), build(patched=False).eval()
    want = stock(x, adapter_names=["__base__" if name is None else name for name in NAMES])
    model(x)  # the layers remember what they found
    with fastlora.peft.route(model, NAMES):
        torch.testing.assert_close(model(x), want)
    report = fastlora.peft.report(model)
    assert report.fused_calls == 4 and report.fallback_calls == 0
    torch.testing.assert_close(model(x), stock(x))  # and after it the active one runs
    assert not model.base_model.model.head._forward_pre_hooks


def test_each_adapter_learns_from_its_own_rows():
    x, dy = torch.randn(5, 7, 12), torch.randn(5, 7, 3)
    model, stock = build().train(), build(patched=False).train()
    with fastlora.peft.route(model, NAMES):
        model(x).backward(dy)
    for name in ("a", "b"):
        stock.set_adapter(name)
        rows = [i for i, other in enumerate(NAMES) if other == name]
        stock(x[rows]).backward(dy[rows])
    wanted = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if wanted[name].grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 10


def test_what_is_not_fused_goes_peft_s_way():
    x, model = torch.randn(5, 12), build(use_dora=False)
    model.base_model.model.q.register_forward_hook(lambda *a: None)  # on the layer itself: still fused
    model.base_model.model.k.lora_A["a"].register_forward_hook(lambda *a: None)
    with fastlora.peft.route(model, NAMES), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = model(x)
    want = build(patched=False).eval()(x, adapter_names=["__base__" if name is None else name for name in NAMES])
    torch.testing.assert_close(y, want)
    report = fastlora.peft.report(model)
    assert report.fused_calls == 1 and report.fallback_calls == 1


def test_compiled():
    x, model = torch.randn(5, 12), build()
    with fastlora.peft.route(model, NAMES):
        want = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), want)


def test_mistakes_are_named():
    unknown = pytest.raises(ValueError, match="holds 'z'; the model has the adapters a, b")
    with unknown, fastlora.peft.route(build(), ["z"]):
        pass
    model = build()
    with fastlora.peft.route(model, ["a", "b"]), pytest.raises(ValueError, match="2 samples"):
        model(torch.randn(3, 12))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".a." in name)
    with pytest.warns(UserWarning, match="'b' asks for no gradient"), fastlora.peft.route(model, ["a", "b"]):
        pass
