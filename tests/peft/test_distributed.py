"""Two gloo processes: DDP and FSDP train a patched model as one process trains a stock one, fused or for a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed") / "results.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def _correct(result):
    assert "error" not in result, result["error"]
    assert result["losses"] == pytest.approx(result["want"], rel=1e-9)
    assert result["difference"] < 1e-9
    assert result["fused_calls"] + result["fallback_calls"] == 12  # three layers, three steps and one more call


@pytest.mark.parametrize("way", ["ddp", "fsdp2_whole", "fsdp2_each_layer"])
def test_fused(results, way):
    result = results[way]
    _correct(result)
    assert result["fallback_calls"] == 0 and result["reasons"] == []
    assert set(result["entries"].values()) <= {"torch", "fused: sharded outside forward, whole inside it"}


@pytest.mark.parametrize(
    "way, reason",
    [
        ("fsdp2_inside_layers", "base_layer is a torch.distributed.fsdp"),
        ("fsdp1", "not a plain parameter"),
        ("fsdp1_inside_layers", "lora_A is a torch.distributed.fsdp"),
    ],
)
def test_own_forward_for_a_reason(results, way, reason):
    result = results[way]
    _correct(result)
    assert result["fused_calls"] == 0
    assert result["reasons"] and all(reason in text for text in result["reasons"])
    assert all(reason in text for text in result["entries"].values())
