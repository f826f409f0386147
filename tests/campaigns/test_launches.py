"""The campaign of launches in its quick form; it needs a CUDA build of torch, and no GPU."""

from __future__ import annotations

import pytest

from campaigns import launches, sync
from fastlora.node import NODE


def test_the_node_hands_to_the_driver_what_triton_does():
    if sync.missing() or NODE is None:
        pytest.skip(sync.missing() or "the node in C++ was not compiled here")
    assert launches.main(["--quick"]) == 0
