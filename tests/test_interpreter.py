"""Runs `tests/kernels` in Triton's interpreter, in a process of its own: the variable must be set before the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


SOME = ("test_bank.py", "test_paths.py", "test_shared.py")  # about half of the time


@pytest.mark.parametrize("some", [True, False], ids=["several", "one"])
def test_kernels_in_the_interpreter(some):
    names = sorted(path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py") if (path.name in SOME) == some)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        *(f"tests/kernels/{name}" for name in names),
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-2000:]
