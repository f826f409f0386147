"""FASTLORA_AUTOTUNE: measured once per bucket, remembered, and shared by processes that meet at the same moment."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time

import pytest
import torch

from fastlora.dispatch import autotune, table
from fastlora.dispatch.problem import Problem

CPU = torch.device("cpu")


def problem(M=960, N=768, K=768, R=16, dropout=False):
    return Problem(M, N, K, R, torch.float32, torch.float32, CPU, dropout)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})


class Measure:
    def __init__(self, **seconds):
        self.seconds, self.seen = seconds, []

    def __call__(self, asked):
        self.seen.append(asked)
        return self.seconds


def test_the_fastest_path_is_chosen_and_measured_at_the_top_of_its_bucket():
    measure = Measure(torch=3.0, split=1.0, onepass=2.0)
    assert autotune.lookup(problem(M=960), measure) == "split"
    assert measure.seen == [problem(M=1024)]


def test_one_bucket_is_measured_once_in_a_process():
    measure = Measure(torch=1.0, split=2.0)
    for M in (513, 960, 1024):
        assert autotune.lookup(problem(M=M), measure) == "torch"
    assert len(measure.seen) == 1


@pytest.mark.parametrize("other", [{"M": 1025}, {"N": 769}, {"K": 100}, {"R": 8}, {"dropout": True}])
def test_another_bucket_is_measured_by_itself(other):
    measure = Measure(torch=1.0)
    autotune.lookup(problem(), measure)
    autotune.lookup(problem(**other), measure)
    assert len(measure.seen) == 2


def test_a_later_process_reads_what_an_earlier_one_measured(monkeypatch):
    autotune.lookup(problem(), Measure(torch=2.0, onepass=1.0))
    monkeypatch.setattr(autotune, "_known", {})  # what a new process knows
    later = Measure(torch=1.0)
    assert autotune.lookup(problem(), later) == "onepass"
    assert later.seen == []


ROW = {"M": 8, "N": 8, "K": 8, "R": 2, "dtype": "float32", "dropout": False, "path": "cpu"}
MIXED = json.dumps({"rows": [ROW | {"M": "8"}, ROW | {"dtype": None}, ROW | {"dropout": None}, ROW | {"M": 8.5}]})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": [{"M": 1}]}', '{"rows": 3}', "[" * 100_000, MIXED])
def test_a_damaged_file_costs_a_measurement_and_is_mended(content):
    file = autotune.store(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert autotune.lookup(problem(), Measure(split=1.0)) == "split"
    assert autotune.read(file) == {table.bucket(problem()): "split"}


@pytest.mark.parametrize("kind", ["pipe", "device", "20 GB"])
def test_what_is_no_file_of_ours_costs_a_measurement_and_is_replaced(kind):
    file = autotune.store(CPU)
    file.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with open(file, "wb") as sparse:
            sparse.truncate(20 << 30)
    assert autotune.lookup(problem(), Measure(split=1.0)) == "split"
    assert autotune.read(file) == {table.bucket(problem()): "split"}


@pytest.mark.parametrize("kind", ["a user's file", "link", "pipe"])
def test_what_stands_in_the_locks_place_keeps_its_content(kind, tmp_path):
    file, mine = autotune.store(CPU), tmp_path / "mine.txt"
    mine.write_text("mine")
    file.parent.mkdir(parents=True)
    lock = file.with_suffix(".lock")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "link":
        lock.symlink_to(mine)
    else:
        mine.rename(lock)
        mine = lock
    with contextlib.nullcontext() if mine == lock else pytest.warns(UserWarning, match="cannot be kept"):
        assert autotune.lookup(problem(), Measure(split=1.0)) == "split"
    assert mine.read_text() == "mine"


def test_a_path_that_is_no_longer_known_is_measured_again():
    file = autotune.store(CPU)
    autotune.write(file, {table.bucket(problem()): "torch"}, CPU)
    file.write_text(file.read_text().replace('"path": "torch"', '"path": "gone"'))
    assert autotune.lookup(problem(), Measure(torch=2.0, split=1.0)) == "split"


def test_the_file_has_the_format_of_the_committed_tables(monkeypatch, tmp_path):
    autotune.lookup(problem(), Measure(onepass=1.0))
    rows = json.loads(autotune.store(CPU).read_text())["rows"]
    (tmp_path / "made-here.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    assert table._rows("made-here") == {table.bucket(problem()): "onepass"}


def test_a_failed_measurement_falls_back_with_one_warning():
    def out_of_memory(_):
        raise RuntimeError("no memory")

    with pytest.warns(UserWarning, match="no memory"):
        assert autotune.lookup(problem(M=7), out_of_memory) == "torch"
    assert autotune.lookup(problem(M=7), Measure(split=1.0)) == "torch"


def test_a_cache_that_cannot_be_written_still_gives_the_measured_path(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    measure = Measure(split=1.0, torch=2.0)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert autotune.lookup(problem(M=9), measure) == "split"
    assert autotune.lookup(problem(M=9), measure) == "split"
    assert len(measure.seen) == 1


def test_while_another_process_holds_the_lock_the_fallback_runs_and_is_not_remembered(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(autotune, "LOCK_WAIT_S", 0.05)
    file = autotune.store(CPU)
    file.parent.mkdir(parents=True)
    with open(file.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert autotune.lookup(problem(), Measure(split=1.0)) == "torch"
    assert autotune.lookup(problem(), Measure(split=1.0)) == "split"


def _process(start, index, results):
    def measure(asked):
        with open(os.path.join(results, f"measured-{asked.N}-{os.getpid()}"), "w"):
            time.sleep(0.05)
        return {"torch": 2.0, "split": 1.0}

    start.wait()
    shared, own = autotune.lookup(problem(N=1), measure), autotune.lookup(problem(N=100 + index), measure)
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
    assert {key[1] for key in autotune.read(autotune.store(CPU))} == {1, *range(100, 106)}


def test_timing_tries_the_paths_that_run_here_and_leaves_the_callers_random_numbers_alone():
    state = torch.random.get_rng_state()
    seconds = autotune.time_paths(problem(M=8, N=16, K=24, R=2, dropout=True))
    assert seconds.keys() - {"cpu"} == {"torch"} and seconds["torch"] > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_path_that_raises_is_no_candidate(monkeypatch):
    from fastlora.dispatch import registry

    def refuse(*_):
        raise ArithmeticError("out of registers")

    monkeypatch.setattr(registry.load("split"), "unavailable", lambda _: None)
    monkeypatch.setattr(registry.load("split"), "unsupported", lambda _: None)
    monkeypatch.setattr(registry.load("split"), "forward", refuse)
    with pytest.warns(UserWarning, match="out of registers"):
        assert autotune.time_paths(problem(M=4, N=8, K=8, R=1)).keys() - {"cpu"} == {"torch"}
