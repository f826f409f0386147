"""What fastlora remembers between processes: one JSON file for each device and versions, in the cache folder."""

from __future__ import annotations

import json
from pathlib import Path

from fastlora import files

MOST = 8 << 20  # bytes of such a file


def read_json(file: Path) -> object:
    """The content of `file`; None when it is absent, damaged or too large, which costs one more measurement."""
    try:
        return json.loads(file.read_bytes()) if file.is_file() and file.stat().st_size <= MOST else None
    except (OSError, ValueError, RecursionError):
        return None


def write_json(file: Path, content: object) -> None:
    """Replace `file` whole, so that no reader sees half of it; OSError when the folder cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, content)
