"""Kernels compiled before they are called, by threads and by helper processes; no GPU is needed."""

from __future__ import annotations

import time

import torch

from fastlora.kernels import ahead
from fastlora.kernels.tiles import Target
from fastlora.paths.problem import Problem

HOPPER, BRAIN = Target("cuda", 90), torch.bfloat16
CALLS = [("hybrid", {}, Problem(64, 64, 64, 8, BRAIN, BRAIN, torch.device("meta"), False))]


def test_a_helper_leaves_in_tritons_cache_what_a_thread_would_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    helper = ahead._helper(HOPPER, CALLS, 0, 1)
    assert helper.wait(timeout=300) == 0
    made = set(tmp_path.rglob("*.cubin"))
    launches = ahead.planned(HOPPER, CALLS)
    assert len(made) == len(launches) >= 4
    for launch in launches:
        launch.compile(HOPPER)
    assert set(tmp_path.rglob("*.cubin")) == made


def test_there_are_helpers_only_where_it_takes_long(monkeypatch):
    asked, loaded, pauses = [], [], [0.0, 0.2]

    class Process:
        def kill(self):
            asked.append("killed")

        def wait(self):
            asked.append("gone")

    def helper(target, calls, index, count):
        asked.append((index, count))
        return Process()

    def load(launch):
        time.sleep(pauses[0])
        loaded.append(launch)
        raise RuntimeError("whoever calls it hears of it")

    monkeypatch.setattr(ahead, "_helper", helper)
    monkeypatch.setattr(ahead, "PATIENCE_S", 0.05)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 6)
    for expected in ([], [(0, 2), (1, 2), *["killed", "gone"] * 2]):
        loaded.clear()
        ahead.compile_all(HOPPER, ["one", "two", "three"], CALLS, load)
        assert asked == expected and sorted(loaded) == ["one", "three", "two"]
        del pauses[:-1]
