"""Two kinds of kernel tests that cannot share a process, for Triton is either its interpreter or its compiler:

- `test_matrix.py` compiles offline; a plain run collects only it.
- All others run the kernels in the interpreter, with TRITON_INTERPRET=1 set before Triton is imported. A plain run of
  the whole suite starts them in a process of their own (`tests/test_interpreter.py`); by hand:
  `TRITON_INTERPRET=1 python -m pytest tests/kernels`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastlora import env

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `import judge`

if env.interpreting():
    from interpreter import patch_once

    patch_once()

COMPILED = {"test_matrix.py"}
collect_ignore = [file.name for file in HERE.glob("test_*.py") if (file.name in COMPILED) == env.interpreting()]


def pytest_collection_modifyitems(items):
    for item in items:  # files named on the command line are collected all the same
        if item.path.parent == HERE and item.path.name in collect_ignore:
            needed = "0" if item.path.name in COMPILED else "1"
            item.add_marker(pytest.mark.skip(reason=f"needs TRITON_INTERPRET={needed}"))
