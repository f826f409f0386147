"""PEFT's LoRA layers, kept as they are, with fused arithmetic: `patch(model)` and nothing else changes.

    model = get_peft_model(model, LoraConfig(...))
    fastlora.peft.patch(model)

Every module that is exactly a `peft.tuners.lora.Linear`, or PEFT's layer over a linear layer of bitsandbytes (4 or 8
bits) or torchao, with DoRA or without, becomes, in place, an instance of a subclass that overrides `forward`: same
object, state dict, repr, config and hooks. Where the fused function would not compute what PEFT computes, PEFT's own
forward runs, and `report(model)` says why. So it does for GPTQ, AWQ and HQQ, whose kernels read their own packing; for
experts (`target_parameters`), whose update goes into a parameter that the experts' code reads itself; for torchao's
weights that it cannot dequantise (Int4Tensor and its kin) or that change x too; and for decoding from 4 bits on a GPU.
A quantised base is kept for backward as it is, in compiled code too, and dequantised again there. Two things differ:
bitsandbytes' 8-bit layers round x to 8 bits as well, on a GPU and in eval mode, where here x stays as it is; and its
4-bit kernel for CPUs takes wrong blocks where a row is no whole number of them, where here they are right.
Layers of transformers' models that read the same x, as query, key and value do, are computed together where
`fastlora.siblings.on` is set; `report` names them.
"""

from __future__ import annotations

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("fastlora.peft needs the package peft: pip install 'fastlora-kernels[peft]'") from error

from fastlora.peft.layer import FusedLinear
from fastlora.peft.patching import KNOWN_VERSIONS, LayerReport, Report, patch, report, unpatch
from fastlora.peft.routing import route

__all__ = ["KNOWN_VERSIONS", "FusedLinear", "LayerReport", "Report", "patch", "report", "route", "unpatch"]
