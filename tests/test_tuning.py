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
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem

CPU = torch.device("cpu")


def problem(M=960, N=768, K=768, R=16, dropout=False):
    return Problem(M, N, K, R, torch.float32, torch.float32, CPU, dropout)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})


class Measure:
    def __init__(self, **seconds):
        self.seconds, self.seen = seconds, []

    def __call__(self, asked):
        self.seen.append(asked)
        return self.seconds


def test_the_fastest_path_is_chosen_and_measured_on_the_calls_own_shape():
    measure = Measure(torch=3.0, split=1.0, onepass=2.0)
    assert tuning.fastest_path(problem(M=960), measure) == "split"
    assert measure.seen == [problem(M=960)]


def test_one_bucket_is_measured_once_in_a_process():
    measure = Measure(torch=1.0, split=2.0)
    for M in (513, 960, 1024):
        assert tuning.fastest_path(problem(M=M), measure) == "torch"
    assert len(measure.seen) == 1


@pytest.mark.parametrize("other", [{"M": 1025}, {"N": 769}, {"K": 100}, {"R": 8}, {"dropout": True}])
def test_another_bucket_is_measured_by_itself(other):
    measure = Measure(torch=1.0)
    tuning.fastest_path(problem(), measure)
    tuning.fastest_path(problem(**other), measure)
    assert len(measure.seen) == 2


def test_a_later_process_reads_what_an_earlier_one_measured(monkeypatch):
    tuning.fastest_path(problem(), Measure(torch=2.0, onepass=1.0))
    monkeypatch.setattr(tuning, "_known", {})  # what a new process knows
    later = Measure(torch=1.0)
    assert tuning.fastest_path(problem(), later) == "onepass"
    assert later.seen == []


ROW = {"M": 8, "N": 8, "K": 8, "R": 2, "dtype": "float32", "dropout": False, "path": "cpu"}
MIXED = json.dumps({"rows": [ROW | {"M": "8"}, ROW | {"dtype": None}, ROW | {"dropout": None}, ROW | {"M": 8.5}]})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": [{"M": 1}]}', '{"rows": 3}', "[" * 100_000, MIXED])
def test_a_damaged_file_costs_a_measurement_and_is_mended(content):
    file = tuning.store(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert tuning.fastest_path(problem(), Measure(split=1.0)) == "split"
    assert tuning.read(file) == {tuning.bucket(problem()): "split"}


def test_a_path_that_is_no_longer_known_is_measured_again():
    file = tuning.store(CPU)
    tuning.write(file, {tuning.bucket(problem()): "torch"}, CPU)
    file.write_text(file.read_text().replace('"path": "torch"', '"path": "gone"'))
    assert tuning.fastest_path(problem(), Measure(torch=2.0, split=1.0)) == "split"


def test_a_failed_measurement_falls_back_with_one_warning():
    def out_of_memory(_):
        raise RuntimeError("no memory")

    with pytest.warns(UserWarning, match="no memory"):
        assert tuning.fastest_path(problem(M=7), out_of_memory) == "torch"
    assert tuning.fastest_path(problem(M=7), Measure(split=1.0)) == "split"  # a failure is not remembered


def test_a_cache_that_cannot_be_written_still_gives_the_measured_path(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    measure = Measure(split=1.0, torch=2.0)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert tuning.fastest_path(problem(M=9), measure) == "split"
    assert tuning.fastest_path(problem(M=9), measure) == "split"
    assert len(measure.seen) == 1


def test_while_another_process_holds_the_lock_the_fallback_runs_and_is_not_remembered(monkeypatch):
    monkeypatch.setattr(tuning, "LOCK_WAIT_S", 0.05)
    file = tuning.store(CPU)
    file.parent.mkdir(parents=True)
    with filelock.FileLock(file.with_suffix(".lock")):
        assert tuning.fastest_path(problem(), Measure(split=1.0)) == "torch"
    assert tuning.fastest_path(problem(), Measure(split=1.0)) == "split"


def _process(start, index, results):
    def measure(asked):
        with open(os.path.join(results, f"measured-{asked.N}-{os.getpid()}"), "w"):
            time.sleep(0.05)
        return {"torch": 2.0, "split": 1.0}

    start.wait()
    shared, own = tuning.fastest_path(problem(N=1), measure), tuning.fastest_path(problem(N=100 + index), measure)
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


def test_timing_tries_the_paths_that_run_here_and_leaves_the_callers_random_numbers_alone():
    state = torch.random.get_rng_state()
    seconds = tuning.time_paths(problem(M=8, N=16, K=24, R=2, dropout=True))
    assert seconds.keys() - {"cpu"} == {"torch"} and seconds["torch"] > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_path_that_raises_is_no_candidate(monkeypatch):
    def refuse(*_):
        raise ArithmeticError("out of registers")

    broken = replace(PATHS["split"], why_not=lambda *_: None, forward=refuse, fingerprint=None)
    monkeypatch.setitem(PATHS, "split", broken)
    with pytest.warns(UserWarning, match="out of registers"):
        assert tuning.time_paths(problem(M=4, N=8, K=8, R=1)).keys() - {"cpu"} == {"torch"}
