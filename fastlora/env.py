"""Every environment variable that fastlora reads, with its meaning. Nothing else in the package touches `os.environ`.

| variable              | meaning                                                                                  |
| --------------------- | ---------------------------------------------------------------------------------------- |
| `FASTLORA_PATH`       | force a path (one of `fastlora.paths()`) for every call that names none                    |
| `FASTLORA_AUTOTUNE`   | `0`: time nothing; else, on a GPU, the usable paths are timed once per bucket of shapes    |
| `FASTLORA_CACHE`      | folder for verdicts, tuning results and downloads (default `~/.cache/fastlora`)            |
| `FASTLORA_DATA`       | folder that `--data auto` looks in before the cache and the network                        |
| `FASTLORA_BUILD_CUDA` | `1` at install: build the optional CUDA C++ library                                        |
| `TRITON_INTERPRET`    | Triton's own: `1` runs the Triton paths on CPU tensors                                     |
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from fastlora.errors import UserError

# os.environ.get costs a microsecond, most of it an exception for the variable that is not set; this runs every call.
_variables = getattr(os.environ, "_data", None)
_FORCED_PATH = os.environ.encodekey("FASTLORA_PATH") if _variables is not None else None


def forced_path() -> str | None:
    """The path named by `FASTLORA_PATH`, or None."""
    if _variables is not None and _FORCED_PATH not in _variables:
        return None
    return os.environ.get("FASTLORA_PATH") or None


def autotune() -> bool:
    """False when `FASTLORA_AUTOTUNE` turns timing on first use off."""
    return os.environ.get("FASTLORA_AUTOTUNE", "1") not in ("", "0")


def expanded(path: str | os.PathLike) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home; UserError when nobody knows where that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{os.fspath(path)!a}: the home folder that it begins with is not known") from None


def cache_dir() -> Path:
    """The folder for everything that may be thrown away (not created here, but for a user without a home folder)."""
    named = os.environ.get("FASTLORA_CACHE")
    if named:
        return expanded(named)
    try:
        return Path.home() / ".cache" / "fastlora"
    except RuntimeError:  # a container's number without a passwd entry, and no HOME
        return _homeless_cache()


def data_dir() -> Path | None:
    """The folder named by `FASTLORA_DATA`, or None."""
    named = os.environ.get("FASTLORA_DATA")
    return expanded(named) if named else None


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def _homeless_cache() -> Path:
    """A folder of this user's own among everybody's temporary files: no other may have put verdicts or data there."""
    user = os.getuid() if hasattr(os, "getuid") else None
    try:
        folder = Path(tempfile.gettempdir()) / f"fastlora-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)  # here, so that no writer makes it with another mode
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"no home folder, and no cache ({error}); name a folder by FASTLORA_CACHE") from None
    if not stat.S_ISDIR(found.st_mode) or (user is not None and (found.st_uid != user or found.st_mode & 0o022)):
        raise UserError(f"no home folder, and {folder} may be another user's; name a folder by FASTLORA_CACHE")
    return folder
