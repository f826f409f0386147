"""Path `cuda`: the place of the optional CUDA C++ GEMM for Hopper. None is shipped: none has run on a GPU yet."""

from __future__ import annotations

import torch

from fastlora.dispatch.problem import Problem

NAME = "cuda"
_REASON = "this version ships no CUDA C++ library"


def unavailable(device: torch.device) -> str | None:
    """Why this path cannot run on `device`."""
    return _REASON


def unsupported(problem: Problem) -> str | None:
    """Why this path cannot run `problem`."""
    return _REASON
