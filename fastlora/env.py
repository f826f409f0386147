"""Every environment variable that fastlora reads, with its meaning. Nothing else in the package touches `os.environ`.

| variable              | meaning                                                                                  |
| --------------------- | ---------------------------------------------------------------------------------------- |
| `FASTLORA_PATH`       | force a path (`torch`, `cpu`, `onepass`, `split`, `cuda`) for every call that names none   |
| `FASTLORA_AUTOTUNE`   | `1`: on a GPU, measure the usable paths once per shape bucket and remember the winner     |
| `FASTLORA_CACHE`      | folder for verdicts, tuning results and downloads (default `~/.cache/fastlora`)            |
| `FASTLORA_DATA`       | folder that `--data auto` looks in before the cache and the network                        |
| `FASTLORA_BUILD_CUDA` | `1` at install: build the optional CUDA C++ library                                        |
| `TRITON_INTERPRET`    | Triton's own: `1` runs the Triton paths on CPU tensors                                     |
"""

from __future__ import annotations

import os
from pathlib import Path

# os.environ.get costs a microsecond, most of it an exception for the variable that is not set; this runs every call.
_variables = getattr(os.environ, "_data", None)
_FORCED_PATH = os.environ.encodekey("FASTLORA_PATH") if _variables is not None else None


def forced_path() -> str | None:
    """The path named by `FASTLORA_PATH`, or None."""
    if _variables is not None and _FORCED_PATH not in _variables:
        return None
    return os.environ.get("FASTLORA_PATH") or None


def autotune() -> bool:
    """True when `FASTLORA_AUTOTUNE` asks for tuning on first use."""
    return os.environ.get("FASTLORA_AUTOTUNE", "") not in ("", "0")


def cache_dir() -> Path:
    """The folder for everything that may be thrown away (not created here)."""
    named = os.environ.get("FASTLORA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fastlora"


def data_dir() -> Path | None:
    """The folder named by `FASTLORA_DATA`, or None."""
    named = os.environ.get("FASTLORA_DATA")
    return Path(named).expanduser() if named else None


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
