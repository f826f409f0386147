"""The autograd node in C++ (csrc/node.cpp), or None: compiled at install for one version of torch, and optional.

It takes ordinary calls whole, forward and backward, and leaves the others to `fastlora.autograd` by returning None. On
a GPU it does what it was shown: a path's first call of a kind runs in Python, here, and its record is handed over.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch
from torch import Tensor

from fastlora.paths.path import Path
from fastlora.paths.problem import Update
from fastlora.record import observe


def _load() -> ModuleType | None:
    """What was compiled for this very version of torch, or None: another version's would not even load safely."""
    try:
        return importlib.import_module("fastlora._node_" + re.sub(r"\W", "_", torch.__version__))
    except ImportError:
        return None


NODE = _load()


def _records(path: Path, x: Tensor) -> bool:
    return NODE is not None and x.is_cuda and path.launches is not None  # all that it launches is Triton's


def forward(path: Path, x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
    """`path.forward`, recorded where the node has use for it."""
    lora_A, lora_B, scaling, p, seed, bank = update
    inputs = (x, weight, lora_A, lora_B, bias, seed)
    if bank is not None or not _records(path, x) or not NODE.lacks(path, inputs, scaling, p, False):
        return path.forward(x, weight, bias, update)
    found, record, _ = observe(lambda: path.forward(x, weight, bias, update), inputs, (True, True))
    NODE.keep(path, inputs, scaling, p, False, record)
    return found


def backward(path: Path, dy: Tensor, x, weight, S: Tensor, update: Update, need_B: bool, given: Tensor):
    """`path.backward`, recorded where the node has use for it; `given` is dy (..., N) before its rows were counted."""
    lora_A, lora_B, scaling, p, seed, bank = update
    inputs = (given, x, weight, lora_A, lora_B, S, seed)
    if bank is not None or not _records(path, dy) or not NODE.lacks(path, inputs, scaling, p, need_B):
        return path.backward(dy, x, weight, S, update, need_B)
    wanted = (weight is not None, x is not None, need_B)
    found, record, _ = observe(lambda: path.backward(dy, x, weight, S, update, need_B), inputs, wanted)
    NODE.keep(path, inputs, scaling, p, need_B, record)
    return found
