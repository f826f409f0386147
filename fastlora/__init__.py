"""fastlora: the LoRA linear layer, y = W x + bias + s·B(A x), fused, with a hand-written backward.

Importing this package asks no GPU anything and imports neither Triton nor PEFT.
"""

from __future__ import annotations

import importlib

from fastlora import reference
from fastlora._version import __version__
from fastlora.adapters import load_adapter, save_adapter
from fastlora.bank import route
from fastlora.choice import explain, paths, selfcheck
from fastlora.functional import lora_linear
from fastlora.inject import inject
from fastlora.linear import FusedLoRALinear
from fastlora.shared import lora_linears

__all__ = [
    "FusedLoRALinear",
    "__version__",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "paths",
    "peft",
    "reference",
    "route",
    "save_adapter",
    "selfcheck",
]


def __getattr__(name: str):
    if name == "peft":  # loads PEFT, which is an extra
        return importlib.import_module("fastlora.peft")
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
