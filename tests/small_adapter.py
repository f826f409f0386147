"""A small model and its adapter, ways to damage the files, and what being refused means: for the tests of adapters."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlora import inject, load_adapter
from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from fastlora.errors import UserError

IDS = torch.arange(8)[None]
A = "base_model.model.fc1.lora_A.weight"


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [("embed", nn.Embedding(11, 6)), ("fc1", nn.Linear(6, 5)), ("fc2", nn.Linear(5, 3, bias=False))]
    return nn.Sequential(OrderedDict(parts))


def shaken(model: nn.Module) -> nn.Module:
    """The model with every trainable parameter moved away from its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def trained(**wanted) -> nn.Module:
    return shaken(
        inject(small(), **{"r": 2, "lora_alpha": 3, "target_modules": ["fc1"], "modules_to_save": ["fc2"]} | wanted)
    )


def state(model: nn.Module) -> dict:
    return {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name][:2] == b[name][:2] and torch.equal(a[name][2], b[name][2]) for name in a
    )


def rewrite(directory: Path, change) -> None:
    """Apply `change(header, data)` to a weights file; both may be changed in place or returned anew."""
    path = directory / WEIGHTS_NAME
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    header, data = change(header, data) or (header, data)
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def configure(directory: Path, **settings) -> None:
    path = directory / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def adapter_entries(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS_NAME)


def same_values(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(directory: Path, model: nn.Module | None = None) -> str:
    """Load into a bare and into an injected model: refused in one line, and both unchanged. Gives the message."""
    given = [model] if model is not None else [small(), trained()]
    for target in given:
        before, recorded = state(target), getattr(target, "fastlora_config", None)
        with pytest.raises(AdapterError) as caught:
            load_adapter(target, directory)
        assert same(state(target), before) and getattr(target, "fastlora_config", None) == recorded
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    return str(caught.value)
