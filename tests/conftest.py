"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import autograd, errors, functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for `import accuracy`


def pytest_collection_modifyitems(items):
    """The longest tests where two processes begin: left to the end, one would run alone."""
    long = [item for item in items if item.path.name == "test_interpreter.py"]
    rest = [item for item in items if item not in long]
    middle = len(rest) // 2
    items[:] = [*long[:1], *rest[:middle], *long[1:], *rest[middle:]]


@pytest.fixture(scope="session")
def cpu_path() -> str:
    """The path that a float32 layer of low rank takes on this CPU: "cpu" where its kernels were compiled."""
    return "cpu" if fastlora.paths("cpu")["cpu"] == "usable" else "torch"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets, or a skip: FASTLORA_TEST_DATA, else `shared/data` beside the checkout."""
    folder = Path(os.environ.get("FASTLORA_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "imdb" / "train.parquet").is_file():
        pytest.skip("no real data here: set FASTLORA_TEST_DATA")
    return folder


@pytest.fixture
def poisoned(monkeypatch):
    """Every empty buffer starts as NaN, so that an element which nothing writes, or which is read unwritten, shows.

    But for those that stand for addresses far apart, larger than memory."""

    def poison(owner, name):
        real = getattr(owner, name)

        def empty(*arguments, **keywords):
            t = real(*arguments, **keywords)
            return t.fill_(float("nan")) if t.dtype.is_floating_point and t.numel() < 2**24 else t

        monkeypatch.setattr(owner, name, empty)

    poison(torch, "empty")
    poison(torch, "empty_like")
    poison(torch.Tensor, "new_empty")
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # ATen then does the same for those who ask it in C++
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(params=["C++", "Python"])
def either_node(request, monkeypatch):
    """Path `cpu` by way of either of its autograd nodes."""
    if request.param == "Python":
        monkeypatch.setattr(functional, "NODE", None)
        monkeypatch.setattr(autograd, "NODE", None)
    elif functional.NODE is None:
        pytest.skip("the node in C++ was not compiled here")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache, none inherits a forced path, or a warning already given once."""
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    for name in ("FASTLORA_PATH", "FASTLORA_DATA", "FASTLORA_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)
