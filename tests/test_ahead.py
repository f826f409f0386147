"""Kernels compiled before they are called, by threads and by helper processes; no GPU is needed."""

from __future__ import annotations

import io
import json
import threading
import time

import pytest
import torch

from fastlora.kernels import ahead
from fastlora.kernels.tiles import Target
from fastlora.paths.problem import Layout, Problem

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


def test_a_helper_goes_when_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    helper = ahead._helper(HOPPER, CALLS, 0, 1)
    helper.stdin.close()
    assert helper.wait(timeout=300) == 0 and not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize("layout", [None, Layout((1, 64), 4, (128, 1), 0)])
def test_a_problem_arrives_as_it_was_sent(layout):
    problem = CALLS[0][2]._replace(layout=layout, dtype=torch.float32, tf32=True, bank=1)
    assert ahead._heard(json.loads(json.dumps(ahead._told(problem)))) == problem


class Process:
    def __init__(self):
        self.stdin, self.gone = io.BytesIO(), threading.Event()

    def wait(self):
        self.gone.set()


@pytest.mark.parametrize("pause, most, expected", [(0.0, 9, 0), (0.2, 9, 2), (0.2, 1, 1)])
def test_there_are_helpers_where_it_takes_long_and_all_are_let_go(monkeypatch, pause, most, expected):
    """`most`: then none can be started any more."""
    started, loaded = [], []

    def helper(target, calls, index, count):
        if len(started) == most:
            raise OSError("no more processes")
        started.append(Process())
        return started[-1]

    def load(launch):
        time.sleep(pause)
        loaded.append(launch)
        raise RuntimeError("whoever calls it hears of it")

    monkeypatch.setattr(ahead, "_helper", helper)
    monkeypatch.setattr(ahead, "helpers", lambda: 2)
    monkeypatch.setattr(ahead, "PATIENCE_S", 0.05)
    ahead.compile_all(HOPPER, ["one", "two", "three"], CALLS, load)
    assert len(started) == expected and sorted(loaded) == ["one", "three", "two"]
    assert all(process.stdin.closed and process.gone.wait(10) for process in started)


def test_few_cores_have_no_helpers(monkeypatch):
    for cores, expected in ((1, 0), (2, 0), (4, 1), (16, 7), (128, 8)):
        monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert ahead.helpers() == expected
    monkeypatch.setattr(ahead.sys, "executable", None)
    assert ahead.helpers() == 0
