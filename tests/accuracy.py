"""The error rule for tests: the package's own, which the device self-check uses too."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastlora.accuracy import Inputs, draw, run, violations
from fastlora.choice import select
from fastlora.paths.problem import draw_seed

__all__ = ["Inputs", "check", "draw", "run", "violations", "with_mask"]


def check(function, inputs: Inputs, **keywords) -> dict:
    """Run `function` forward and backward, fail on any violation of the rule, and return its outputs."""
    got = run(function, inputs, **keywords)
    found = violations(got, inputs)
    assert not found, "; ".join(found)
    return got


def with_mask(inputs: Inputs, dropout_p: float, seed: int, path: str | None = None) -> Inputs:
    """The inputs with the mask that the next call after this one draws: torch's generator is left at `seed`."""
    chosen = select(inputs.x, inputs.weight, inputs.lora_A, dropout_p, path)
    torch.manual_seed(seed)
    drawn = draw_seed(inputs.x.device)
    mask = chosen.mask(drawn, inputs.x.shape[:-1].numel(), inputs.x.shape[-1], dropout_p).view(inputs.x.shape)
    torch.manual_seed(seed)
    return replace(inputs, dropout_p=dropout_p, mask=mask)
