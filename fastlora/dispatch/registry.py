"""The paths by name, each loaded when it is first asked for: importing fastlora imports no Triton."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from fastlora import env

# What `choice.select` has found for a shape, and under a number what path `cpu` looks up in C++. Here, since a new
# verdict of the self-check empties it.
selected: dict[tuple | int, ModuleType] = {}

NAMES = ("torch", "cpu", "onepass", "split", "cuda")


@cache
def load(name: str) -> ModuleType:
    """The module of path `name`.

    Raises:
        ValueError: no such path.
    """
    if name not in NAMES:
        whose = "FASTLORA_PATH" if env.forced_path() == name else "path"
        raise ValueError(f"{whose} is {name!r}; it needs to be one of {', '.join(map(repr, NAMES))}, or None to choose")
    return importlib.import_module(f"fastlora.dispatch.{name}")
