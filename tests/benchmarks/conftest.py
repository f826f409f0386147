"""Result rows without a measurement."""

from __future__ import annotations

import pytest

from benchmarks import measure


def make_row(case="layer-f32", contender="fastlora", over_bare=1.2, *, spread=0.01, bare=1e-3, **other):
    """A row as the runner makes it: `over_bare` times the bare linear, `spread` the noise on both sides."""

    def band(value):
        return {"median": value, "p20": value * (1 - spread), "p80": value * (1 + spread)}

    row = {
        "case": case,
        "family": "layer",
        "M": 960,
        "K": 768,
        "N": 768,
        "R": 16,
        "dtype": "float32",
        "dropout": 0.0,
        "direction": "forward+backward",
        "contender": contender,
        "mode": "plain",
        "samples": 9,
        **{key: value * bare for key, value in band(over_bare).items()},
        "over_bare": band(over_bare),
        "over_eager": band(over_bare / 1.5),
        "tflops": 1.0,
        "model_bytes": 1e6,
        "bytes_per_s": 1e9,
        "predicted": 1e-3,
        "predicted_over_bare": 1.1,
        "predicted_launches": 8,
        "peak_memory_bytes": 1 << 20,
    }
    if contender == "fastlora":
        row["path"] = "torch"
    return row | other


def make_payload(rows):
    """A suite's file with those rows."""
    ceilings = {"bytes_per_s": 1e10, "flops_per_s": {"float32": 1e11, "float16": 1e11, "bfloat16": 2e11}}
    metadata = measure.metadata("cpu") | {"load_before": 0.0}
    return {"kind": "suite", "metadata": metadata, "left_out": [], "ceilings": ceilings, "rows": rows}


@pytest.fixture
def row():
    return make_row


@pytest.fixture
def suite_payload():
    return make_payload
