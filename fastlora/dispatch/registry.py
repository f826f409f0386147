"""The paths by name, each loaded when it is first asked for: importing fastlora imports no Triton."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

# What `choice.select` has found for a shape. Here, since a new verdict of the self-check empties it.
selected: dict[tuple, ModuleType] = {}

NAMES = ("torch", "cpu", "onepass", "split", "cuda")


@cache
def load(name: str) -> ModuleType:
    """The module of path `name`.

    Raises:
        ValueError: no such path.
    """
    if name not in NAMES:
        raise ValueError(f"path is {name!r}; it needs to be one of {', '.join(map(repr, NAMES))}, or None to choose")
    return importlib.import_module(f"fastlora.dispatch.{name}")
