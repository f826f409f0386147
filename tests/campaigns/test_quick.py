"""Each campaign in its quick form. The long ones are commands; see each module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from campaigns import concurrency, memory, numbers, observe, properties
from campaigns.case import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    """And bitsandbytes' own torch.compile off: on a CPU it compiles its dequantisation for each shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


def test_numbers():
    said = []
    ran, failed, _ = numbers.campaign(600, 300, seed=1, say=said.append)
    assert not failed, said
    assert ran == 600


def test_a_wrong_layer_is_found_and_shrunk(monkeypatch):
    import fastlora

    right = fastlora.lora_linear

    def wrong(x, weight, *rest, **keywords):
        y = right(x, weight, *rest, **keywords)
        return y * (1 + 1e-3) if x.shape[-1] >= 7 else y

    monkeypatch.setattr(fastlora, "lora_linear", wrong)
    case = Case(seed=5, lead=(4, 3), N=8, K=31, R=8, bias=True, scaling=2.0, x="stepped", mode="no_grad")
    assert observe.faults(case)
    small = numbers.shrink(case)
    assert observe.faults(small) and (small.K, small.N, small.R, small.mode) == (7, 1, 1, "plain")
    assert eval(str(small), {"Case": Case}) == small


def test_numbers_in_the_interpreter():
    command = [sys.executable, "-m", "tests.campaigns.numbers", "--interpreter", "--count", "25", "--seconds", "60"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*command, "--seed", "1"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " 0 wrong" in done.stdout, done.stdout + done.stderr[-2000:]


def test_what_is_kept_for_backward():
    import random

    rng = random.Random(1)
    for _ in range(40):
        case = memory.random_case(rng)
        kept, wanted = memory.kept_bytes(case)
        assert kept == wanted, str(case)


@pytest.mark.parametrize("kind", memory.KINDS)
def test_steps_leave_nothing_behind(kind):
    found = [memory.steps(200, kind, 150) for _ in range(2)]  # the allocator's pools fill once; a leak grows each time
    assert max(tensors for _, tensors in found) <= 0
    assert min(more for more, _ in found) < 4 << 20


def test_broken_steps_leave_nothing_behind():
    assert memory.broken_steps(50, seed=1) <= 0


def test_properties():
    assert properties.campaign(40, seed=1) == []


def test_threads_forks_and_workers():
    assert concurrency.threads(4, 50) == 0
    assert concurrency.forks(3) == 0
    assert concurrency.workers(2, 20, "fork") == 0


@pytest.mark.parametrize("name", concurrency.NEIGHBOURS)
def test_calls_beside_other_work(name):
    calls, wrong = concurrency.neighbours(name, 1.0)
    assert wrong == 0 and calls > 10
