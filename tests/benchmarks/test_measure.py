"""Interleaved timing, its statistics, and where results are written."""

from __future__ import annotations

import json

import pytest

from benchmarks import measure


def test_every_contender_has_a_sample_of_every_round():
    calls = {"a": 0, "b": 0}

    def count(name):
        def call():
            calls[name] += 1

        return call

    samples = measure.interleave({name: count(name) for name in calls}, 0.0, device="cpu", min_rounds=4)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 4, "b": 4}
    assert all(seconds >= 0 for values in samples.values() for seconds in values)
    assert min(calls.values()) > 4 * 10  # a call of nothing is repeated until the clock can see it


def test_the_order_changes_from_round_to_round(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "_cpu_sample", lambda fn, calls: fn() or 1.0)
    names = "abcd"
    measure.interleave({n: (lambda n=n: order.append(n)) for n in names}, 0.0, device="cpu", min_rounds=12)
    rounds = ["".join(order[-48:][i : i + 4]) for i in range(0, 48, 4)]
    assert all(sorted(one) == list(names) for one in rounds)
    assert len(set(rounds)) > 4


def test_rounds_go_on_until_the_budget_is_spent(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(measure, "_cpu_sample", lambda fn, calls: 1.0)
    samples = measure.interleave({"a": lambda: None}, 20.0, device="cpu", min_rounds=3)
    assert len(samples["a"]) == 3 + 19  # the clock, read before each round from the fourth on, counts to 20


def test_summary_and_ratio():
    seconds = [5.0, 1.0, 2.0, 3.0, 4.0]
    assert measure.summary(seconds) == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2, "samples": 5})
    assert measure.summary([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "samples": 1}
    assert measure.ratio([2.0, 8.0, 3.0], [1.0, 2.0, 2.0])["median"] == 2.0  # of 2, 4 and 1.5, round by round


def test_metadata_says_what_a_reader_needs():
    found = measure.metadata("cpu")
    assert found["device"].startswith("cpu-") and found["device"].endswith("c")
    assert found["versions"]["torch"] and found["versions"]["python"]
    assert {"date", "commit", "uncommitted_changes", "device_name", "threads"} <= found.keys()
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("Tesla T4", "tesla-t4")],
)
def test_a_gpus_slug_is_its_name(monkeypatch, name, slug):
    monkeypatch.setattr(measure, "device_name", lambda _: name)
    assert measure.device_slug("cuda") == slug


def test_a_cpus_slug_has_its_cores_and_no_frills(monkeypatch):
    monkeypatch.setattr(measure, "device_name", lambda _: "Intel(R) Xeon(R) CPU @ 2.20GHz")
    monkeypatch.setattr(measure, "_cores", lambda: 4)
    assert measure.device_slug("cpu") == "cpu-intel-xeon-4c"


def test_results_are_named_by_date(tmp_path):
    payload = {"metadata": measure.metadata("cpu"), "rows": [1, 2]}
    path = measure.write_results("steps", payload, tmp_path)
    assert json.loads(path.read_text()) == payload
    assert path.name.endswith("-steps.json") and path.name[:2] == "20"
