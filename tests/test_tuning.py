"""FASTLORA_AUTOTUNE: measured once per bucket, remembered, and shared by processes that meet at the same moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace

import filelock
import pytest
import torch

from fastlora import tuning
from fastlora.kernels.tiles import Tile
from fastlora.paths import PATHS
from fastlora.paths.problem import Layout, Problem

CPU = torch.device("cpu")


def problem(M=960, N=768, K=768, R=16, dropout=False, layout=None):
    return Problem(M, N, K, R, torch.float32, torch.float32, CPU, dropout, layout)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})


class Measure:
    """A measurement that gives every path the same seconds plain and captured."""

    def __init__(self, failed=False, **seconds):
        timings = tuple(tuning.Timing(PATHS[name], both, both) for name, both in seconds.items())
        self.row, self.seen = tuning.Row(timings, failed), []

    def __call__(self, asked):
        self.seen.append(asked)
        return self.row


def fastest(asked, measure, captured=False):
    row = tuning.measured(asked, measure)
    return row and row.winner(captured).label


def test_the_fastest_path_is_chosen_and_measured_on_the_calls_own_shape():
    measure = Measure(torch=3.0, split=1.0, onepass=2.0)
    assert fastest(problem(M=960), measure) == "split"
    assert measure.seen == [problem(M=960)]


def test_one_bucket_is_measured_once_in_a_process():
    measure = Measure(torch=1.0, split=2.0)
    for M in (513, 960, 1024):
        assert fastest(problem(M=M), measure) == "torch"
    assert len(measure.seen) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"M": 1025},
        {"N": 769},
        {"K": 100},
        {"R": 8},
        {"dropout": True},
        {"layout": Layout((768, 1), 4, (768, 1), 0)},
    ],
)
def test_another_bucket_is_measured_by_itself(other):
    measure = Measure(torch=1.0)
    tuning.measured(problem(), measure)
    tuning.measured(problem(**other), measure)
    assert len(measure.seen) == 2


def test_a_later_process_reads_what_an_earlier_one_measured_its_tiles_and_both_winners(monkeypatch):
    tiled = PATHS["split"].with_tiles({"s": Tile(32, 0, 128, 4, 4), "gemm": Tile(128, 256, 64, 8, 4, tma=True)})
    timings = tuning.Timing(tiled, 2.0, 1.0), tuning.Timing(PATHS["torch"], 1.0, 2.0)
    tuning.measured(problem(), lambda asked: tuning.Row(timings))
    monkeypatch.setattr(tuning, "_known", {})  # what a new process knows
    later = Measure(torch=1.0)
    assert fastest(problem(), later) == "torch"
    assert fastest(problem(), later, captured=True) == tiled.label == "split gemm=128x256x64w8s4t s=32x128w4s4"
    assert later.seen == []
    assert tuning.known(problem()).winner(True).cut == tiled.cut
    assert "1000000.0" in str(tuning.known(problem())) and tiled.label in str(tuning.known(problem()))


ROW = {"M": 8, "N": 8, "K": 8, "R": 2, "dtype": "float32", "adapter_dtype": "float32", "dropout": False, "layout": ""}
BAD = (
    ROW | {"M": "8"},
    ROW | {"timings": []},
    ROW | {"timings": [["torch", {}, "fast", 1.0]]},
    ROW | {"timings": [["split", {"s": ["32", 0, 128, 4, 4]}, 1.0, 1.0]]},
    ROW | {"timings": [["split", {"s": 7}, 1.0, 1.0]]},
    ROW | {"timings": [["gone", {}, 1.0, 1.0]]},
    ROW | {"timings": [["split"]]},
    ROW | {"layout": [[]], "timings": [["torch", {}, 1.0, 1.0]]},
    None,
)
MIXED = json.dumps({"rows": BAD})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": [{"M": 1}]}', '{"rows": 3}', "[" * 100_000, MIXED])
def test_a_damaged_file_costs_a_measurement_and_is_mended(content):
    file = tuning.store(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert fastest(problem(), Measure(split=1.0)) == "split"
    assert list(tuning.read(file)) == [tuning.bucket(problem())]


def test_a_failed_measurement_falls_back_with_one_warning():
    def out_of_memory(_):
        raise torch.OutOfMemoryError("no memory")

    with pytest.warns(UserWarning, match="no memory"):
        assert fastest(problem(M=7), out_of_memory) is None
    assert fastest(problem(M=7), Measure(split=1.0)) == "split"  # a failure is not remembered


def test_where_one_path_failed_the_others_times_hold_for_this_process_only(monkeypatch):
    assert fastest(problem(), Measure(failed=True, torch=1.0)) == "torch"
    assert fastest(problem(N=8), Measure(torch=1.0)) == "torch"
    assert fastest(problem(), Measure(split=1.0)) == "torch"
    monkeypatch.setattr(tuning, "_known", {})
    assert fastest(problem(), Measure(split=1.0)) == "split"


def test_a_cache_that_cannot_be_written_still_gives_the_measured_path(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    measure = Measure(split=1.0, torch=2.0)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert fastest(problem(M=9), measure) == "split"
    assert fastest(problem(M=9), measure) == "split"
    assert len(measure.seen) == 1


def test_while_another_process_holds_the_lock_nothing_is_known_and_that_is_not_remembered(monkeypatch):
    monkeypatch.setattr(tuning, "LOCK_WAIT_S", 0.05)
    file = tuning.store(CPU)
    file.parent.mkdir(parents=True)
    with filelock.FileLock(file.with_suffix(".lock")):
        assert fastest(problem(), Measure(split=1.0)) is None
    assert fastest(problem(), Measure(split=1.0)) == "split"


def _process(start, index, results):
    def measure(asked):
        with open(os.path.join(results, f"measured-{asked.N}-{os.getpid()}"), "w"):
            time.sleep(0.05)
        return Measure(torch=2.0, split=1.0).row

    start.wait()
    shared, own = fastest(problem(N=1), measure), fastest(problem(N=100 + index), measure)
    os._exit(0 if (shared, own) == ("split", "split") else 1)


def test_processes_that_meet_at_one_shape_measure_it_once_and_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), tmp_path / "results"
    results.mkdir()
    workers = [context.Process(target=_process, args=(start, index, str(results))) for index in range(6)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert len(list(results.glob("measured-1-*"))) == 1
    assert {key[1] for key in tuning.read(tuning.store(CPU))} == {1, *range(100, 106)}


def test_timing_tries_the_paths_that_run_here_and_leaves_the_callers_random_numbers_alone(capsys):
    state = torch.random.get_rng_state()
    row = tuning.time_paths(problem(M=8, N=16, K=24, R=2, dropout=True))
    names = [one.path.name for one in row.timings]
    assert set(names) - {"cpu"} == {"torch"} and all(one.plain > 0 for one in row.timings) and not row.failed
    assert torch.equal(torch.random.get_rng_state(), state)
    line = f"fastlora: timing {len(names)} paths for 8×16×24 f32 r2 dropout, once per machine\n"
    assert capsys.readouterr().err == line


def test_a_path_that_raises_is_no_candidate(monkeypatch):
    def refuse(*_):
        raise ArithmeticError("out of registers")

    broken = replace(PATHS["hybrid"], why_not=lambda *_: None, forward=refuse, fingerprint=None, tiles=None)
    monkeypatch.setitem(PATHS, "hybrid", broken)
    with pytest.warns(UserWarning, match="out of registers"):
        row = tuning.time_paths(problem(M=4, N=8, K=8, R=1))
    assert {one.path.name for one in row.timings} - {"cpu"} == {"torch"} and row.failed


def test_the_other_tiles_of_close_paths_are_timed_one_by_one_and_the_best_together(monkeypatch):
    """Tiles A, B and C of two kernels; the second kernel's third tile is faster, and a path far behind is left."""
    tried = []
    seconds = {"one": {"A": 1.0, "B": 2.0, "C": 3.0}, "two": {"A": 1.0, "B": 2.0, "C": 0.25}}

    def time(session, paths):
        tried.append([path.label for path in paths])
        times = [sum(seconds[kernel][tile] for kernel, tile in path.cut) or 2.1 for path in paths]
        times = [9.0 if path.name == "split" else one for path, one in zip(paths, times, strict=True)]
        return [tuning.Timing(path, one, one) for path, one in zip(paths, times, strict=True)]

    def path(name):
        tiles = {"one": ("A", "B", "C"), "two": ("A", "B", "C", "D")}
        return replace(PATHS[name], why_not=lambda *_: None, tiles=lambda problem: tiles)

    monkeypatch.setattr(tuning, "PATHS", {"torch": PATHS["torch"], "hybrid": path("hybrid"), "split": path("split")})
    monkeypatch.setattr(tuning._Session, "time", time)
    row = tuning.time_paths(problem(M=4, N=8, K=8, R=1))
    assert tried == [
        ["torch", "hybrid one=A two=A", "split one=A two=A"],
        ["hybrid one=B two=A", "hybrid one=C two=A", "hybrid one=A two=B", "hybrid one=A two=C"],
        ["hybrid one=A two=C"],
    ]
    assert row.winner(False).label == row.winner(True).label == "hybrid one=A two=C"


def test_what_arithmetic_calls_hopeless_is_not_timed_but_torch_always_is(monkeypatch):
    seconds = {"torch": 9.0, "hybrid": 1.0, "split": 1.9, "onepass": 2.1}
    monkeypatch.setattr(tuning.roofline, "predict", lambda name, *_: seconds[name])
    problem = Problem(64, 64, 64, 8, torch.bfloat16, torch.bfloat16, torch.device("cuda", 0), True)
    found = tuning._hopeful([PATHS[name] for name in seconds], problem)
    assert [path.name for path in found] == ["torch", "hybrid", "split"]
