"""Small PEFT models, stock and patched, and a clean slate of warnings for each test."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from fastlora import errors


class Net(nn.Module):
    """Two linear layers and a Conv1D."""

    def __init__(self, width=24):
        super().__init__()
        self.first = nn.Linear(width, 32)
        self.conv = Conv1D(16, 32)
        self.last = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(torch.tanh(self.first(x)))))


TARGETS = ["first", "conv", "last"]


def build(dtype=torch.float32, seed=0, **config):
    """A stock PEFT model on `Net` with lora_B away from zero."""
    torch.manual_seed(seed)
    config = {"target_modules": TARGETS, "r": 5, "lora_alpha": 15, "init_lora_weights": False, **config}
    with pytest.warns() if "conv" in config["target_modules"] else _nothing():
        return get_peft_model(Net().to(dtype), LoraConfig(**config))


class _nothing:
    def __enter__(self): ...
    def __exit__(self, *args): ...


def twins(dtype=torch.float32, **config):
    """(stock, a copy of it to be patched)."""
    stock = build(dtype, **config)
    return stock, copy.deepcopy(stock)


def layer_of(model, name="first"):
    return model.base_model.model.get_submodule(name)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
