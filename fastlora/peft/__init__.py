"""PEFT's LoRA layers, kept as they are, with fused arithmetic: `patch(model)` and nothing else changes.

    model = get_peft_model(model, LoraConfig(...))
    fastlora.peft.patch(model)

Every module that is exactly a `peft.tuners.lora.Linear` becomes, in place, an instance of a subclass that overrides
`forward`: same object, state dict, repr, config and hooks. Where the fused function would not compute what PEFT
computes, PEFT's own forward runs, and `report(model)` says why.
"""

from __future__ import annotations

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("fastlora.peft needs the package peft: pip install 'fastlora-kernels[peft]'") from error

from fastlora.peft.layer import FusedLinear
from fastlora.peft.patching import KNOWN_VERSIONS, LayerReport, Report, patch, report, unpatch

__all__ = ["KNOWN_VERSIONS", "FusedLinear", "LayerReport", "Report", "patch", "report", "unpatch"]
