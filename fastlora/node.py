"""The autograd node in C++ (csrc/node.cpp), or None: compiled at install for one version of torch, and optional.

It takes ordinary calls whole, forward and backward, and leaves the others to `fastlora.autograd` by returning None.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch

from fastlora.paths import cpu


def _load() -> ModuleType | None:
    """What was compiled for this very version of torch, or None: another version's would not even load safely."""
    try:
        return importlib.import_module("fastlora._node_" + re.sub(r"\W", "_", torch.__version__))
    except ImportError:
        return None


NODE = None if cpu._cpu is None else _load()
