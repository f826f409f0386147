"""What runs on a GPU when nobody names a path: with an empty cache, a full one, captured, compiled, ...

On a real GPU, or on the stand-in, which computes nothing (there the comparisons run, and count as passed):

    python -m tests.campaigns.sync python -m pytest tests/gpu/test_default.py
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import check, choice, env, errors, tuning
from fastlora.finetune import tune
from fastlora.finetune.data import Batches
from fastlora.finetune.step import WARM_UP, Settings
from fastlora.finetune.trainer import Member, Trainer
from fastlora.info import info
from fastlora.paths import PATHS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or the stand-in for one")
DEVICE = torch.device("cuda", 0)
HOLLOW = torch.cuda.is_available() and hasattr(ctypes.CDLL("libcuda.so.1"), "hollow_launches")
LINE = re.compile(r"fastlora: timing \d paths for 64×96×128 bf16 r8 dropout, once per machine\n")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A first process with an empty cache, and quick measurements."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic test
    monkeypatch.setattr(tuning, "ROUNDS", 2)
    monkeypatch.setattr(tuning, "MOST_TILES", 1)
    monkeypatch.setattr(errors, "_said", set())
    if HOLLOW:
        passes = check._fault
        monkeypatch.setattr(check, "_fault", lambda *arguments: passes(*arguments) and None)
    forget(monkeypatch)


def forget(monkeypatch):
    """What a new process knows."""
    for owner, name in ((check, "_verdicts"), (check, "_kernels"), (tuning, "_known")):
        monkeypatch.setattr(owner, name, {})
    monkeypatch.setattr(tuning, "_loaded", set())
    choice.forget()


def layer_and_x(M=64, N=96, K=128):
    layer = fastlora.FusedLoRALinear(K, N, r=8, lora_dropout=0.1, device=DEVICE, dtype=torch.bfloat16)
    return layer, torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)


def step(layer, x):
    y = layer(x)
    torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), torch.ones_like(y))


def rows():
    return tuning.read(tuning.store(DEVICE))


def verdicts():
    return list((env.cache_dir() / "selfcheck").glob("*.json"))


def selected():
    """The paths that calls have been given, the last one last."""
    return [path.name for path in choice._selected.values()]


def refuse(monkeypatch):
    """From here on nothing may be timed, compared or compiled."""
    monkeypatch.setattr(tuning, "time_paths", lambda problem: pytest.fail("timed"))
    monkeypatch.setattr(check.Trial, "fault", lambda trial, path: pytest.fail("compared"))
    import triton

    def compiled(*_, cache_hit, **__):
        assert cache_hit, "compiled"

    monkeypatch.setattr(triton.knobs.compilation, "listener", compiled, raising=False)


def test_an_empty_cache(capfd, monkeypatch):
    layer, x = layer_and_x()
    step(layer, x)
    assert LINE.fullmatch(capfd.readouterr().err)
    ((key, row),) = rows().items()
    usable = {name for name, path in PATHS.items() if path.why_not(DEVICE, None) is None}
    assert key[:4] == (64, 96, 128, 8) and {one.path.name for one in row.timings} == usable
    assert len(verdicts()) == len(usable - {"torch"})
    said = fastlora.explain(layer, x)
    assert said.path == row.winner(captured=False).name and said.table == str(row)
    assert str(row) in info() and "M 64, N 96, K 128, R 8" in info()
    refuse(monkeypatch)
    step(layer, x)
    assert selected() == [said.path]
    assert capfd.readouterr().err == ""


def test_a_full_cache(capfd, monkeypatch):
    layer, x = layer_and_x()
    step(layer, x)
    forget(monkeypatch)
    refuse(monkeypatch)
    step(layer, x)
    (row,) = rows().values()
    assert selected() == [row.winner(captured=False).name]
    assert LINE.fullmatch(capfd.readouterr().err)  # of the first process


def test_a_capture_compiles_nothing_raises_nothing_and_has_its_own_winner(monkeypatch):
    layer, x = layer_and_x()
    leaves = x, layer.lora_A, layer.lora_B
    y = fastlora.lora_linear(x, layer.weight, *leaves[1:], layer.bias, 2.0, 0.1, path="torch")
    torch.autograd.grad(y, leaves, torch.ones_like(y))  # cuBLAS cannot begin in a capture; the mask's kernel compiles
    del y  # whose graph would have autograd wait for the stream of this step in the capture
    chosen, choose = [], choice.choose

    def spy(problem):
        chosen.append(choose(problem))
        return chosen[-1]

    def captured():
        chosen.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(layer, x)
        graph.replay()
        return chosen[-1].path

    def times(problem):
        seconds = {"torch": (2.0, 2.0), "hybrid": (1.0, 2.0), "split": (2.0, 1.0)}
        paths = {name: tuning.pin(PATHS[name], problem) for name in seconds}
        return tuning.Row(tuple(tuning.Timing(paths[name], *both) for name, both in seconds.items()))

    monkeypatch.setattr(choice, "choose", spy)
    with monkeypatch.context() as here:
        refuse(here)
        assert captured() == "torch"
    assert not rows()
    monkeypatch.setattr(tuning, "time_paths", times)
    step(layer, x)
    refuse(monkeypatch)
    assert chosen[-1].path == "hybrid"
    assert captured() == "split"


def test_a_compiled_call_times_once_too_and_takes_the_same_choice(monkeypatch, capfd):
    layer, x = layer_and_x()
    step(torch.compile(layer, backend="aot_eager"), x)
    torch._dynamo.reset()
    assert LINE.fullmatch(capfd.readouterr().err)
    (row,) = rows().values()
    assert not row.failed and selected() == [row.winner(captured=False).name]
    refuse(monkeypatch)
    step(layer, x)
    assert set(selected()) == {row.winner(captured=False).name}


def test_an_op_that_someone_watches_times_and_checks_as_a_call_does(monkeypatch):
    """Under an op autograd's dispatch keys are off: the self-check, which needs gradients, must not see that."""
    layer, x = layer_and_x()
    y, _ = torch.ops.fastlora.forward(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, 2.0, 0.0, None, "")
    torch.autograd.grad(y, (x, layer.lora_A), torch.ones_like(y))
    assert rows() and all(verdict is None for verdict in check._verdicts.values())


def test_deterministic_algorithms_time_nothing_and_take_what_is_admitted(monkeypatch):
    layer, x = layer_and_x()
    torch.use_deterministic_algorithms(True)
    try:
        with monkeypatch.context() as here:
            here.setattr(tuning, "time_paths", lambda problem: pytest.fail("timed"))
            step(layer, x)
            assert selected() == ["torch"] and not rows() and not verdicts()
            assert "deterministic" in fastlora.explain(layer, x).reason
            choice.forget()
            here.setenv("FASTLORA_PATH", "hybrid")  # which admits it
            step(layer, x)
        choice.forget()
        refuse(monkeypatch)
        said = fastlora.explain(layer, x)
        assert said.path in ("hybrid", "torch") and "torch, hybrid" in said.reason
        step(layer, x)
        assert selected() == [said.path]
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_processes_at_once_time_once():
    program = """
import os, torch
from tests.gpu import test_default as t
from fastlora import check, tuning
tuning.MOST_TILES, tuning.ROUNDS = 1, 2
passes = check._fault
if t.HOLLOW:
    check._fault = lambda *arguments: passes(*arguments) and None
layer, x = t.layer_and_x()
t.step(layer, x)
print(*t.selected(), flush=True)
os._exit(0)  # on the stand-in torch itself aborts at the end of a process that has run a backward
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    root = Path(__file__).resolve().parents[2]
    both = [
        subprocess.Popen(command, cwd=root, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (row,) = rows().values()
    assert {output.strip() for output, _ in outputs} == {row.winner(captured=False).name}
    assert len(LINE.findall("".join(error for _, error in outputs))) == 1


def test_out_of_memory_while_timing(monkeypatch):
    layer, x = layer_and_x()
    draw = tuning.drawn

    def no_memory(problem, device=None):
        if device == "meta":
            return draw(problem, device)
        raise torch.OutOfMemoryError("no memory for that")

    with monkeypatch.context() as here:
        here.setattr(tuning, "drawn", no_memory)
        with pytest.warns(errors.FastLoRAWarning, match="path 'torch' runs: no memory for that"):
            step(layer, x)
        assert not selected() and not rows()  # path torch, until it is tried again
        monkeypatch.setattr(choice, "RETRY_S", -1.0)
    choice.forget()
    monkeypatch.setattr(check, "drawn", no_memory)  # now the self-check has none, for any path
    step(layer, x)
    assert selected() == ["torch"] and not rows() and not verdicts()


def test_a_read_only_cache(monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    layer, x = layer_and_x()
    with pytest.warns(errors.FastLoRAWarning, match="be kept"):
        step(layer, x)
    assert LINE.fullmatch(capfd.readouterr().err)
    refuse(monkeypatch)
    step(layer, x)


def test_a_bank_of_adapters(capsys):
    """Timed once, chosen, explained; captured with the same route."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 96, device=DEVICE, dtype=torch.bfloat16))
    fastlora.inject(model, adapters={"a": {"r": 8}, "b": {"r": 4, "lora_dropout": 0.1}})
    x = torch.randn(4, 16, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    capsys.readouterr()
    with fastlora.route(model, ["a", "b", None, "b"]):

        def one():
            y = model(x)
            torch.autograd.grad(y, leaves, torch.ones_like(y))

        for _ in range(3):
            one()
        assert (
            len(re.findall(r"timing \d paths for 64×96×128 bf16 r12 dropout of several", capsys.readouterr().err)) == 1
        )
        found = fastlora.explain(model[0], x)
        assert found.path in PATHS and "plain" in found.table
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        graph.replay()


@pytest.mark.parametrize("plain, captured", [("split", "torch"), ("torch", "split"), ("hybrid", "onepass")])
def test_a_captured_bank_finds_its_tables_there(plain, captured, monkeypatch):
    """The path that a graph takes may read other tables than that of the calls before it."""

    def times(problem):
        seconds = {plain: (1.0, 2.0), captured: (2.0, 1.0)}
        return tuning.Row(tuple(tuning.Timing(tuning.pin(PATHS[n], problem), *both) for n, both in seconds.items()))

    if HOLLOW:
        monkeypatch.setattr(check.Trial, "fault", lambda *_: None)
    chosen, choose = [], choice.choose
    monkeypatch.setattr(choice, "choose", lambda problem: chosen.append(choose(problem)) or chosen[-1])
    monkeypatch.setattr(tuning, "time_paths", times)
    model = torch.nn.Sequential(torch.nn.Linear(128, 96, device=DEVICE, dtype=torch.bfloat16))
    fastlora.inject(model, adapters={"a": {"r": 8}, "b": {"r": 4, "lora_dropout": 0.1}})
    x = torch.randn(4, 16, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with fastlora.route(model, ["a", "b", None, "b"]):
        for _ in range(2):
            y = model(x)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        del y
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [one.path for one in chosen] == [plain, captured]
    graph.replay()


def sweep():
    """A trainer of three adapters, after it has said what memory they need."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).to(DEVICE)
    members = [Member(f"run{i}", {"lr": 0.1, "rank": 2 + i, "alpha": 4.0, "seed": i}) for i in range(3)]
    tune.adapt(model, members, "fused", ["0"], heads=["2"])
    optimiser = torch.optim.SGD(tune.groups_of(model, members), fused=True)
    batches = Batches(48, lambda rows: (rows[:, None].float().expand(-1, 8) / 48, rows % 2), 16, device=DEVICE)
    trainer = Trainer(model, optimiser, batches, batches, Settings(clip=1.0, graph=True), members, progress=False)
    tune.announce(trainer)
    trainer.step.names = tuple(member.name for member in members)
    return trainer, batches.at(0, 0, range(3))


def test_a_sweeps_steps_are_captured():
    trainer, batch = sweep()
    for _ in range(WARM_UP + 2):
        trainer.step([batch])
    assert trainer.step.plain is None and len(trainer.step._graphs) == 1


def test_a_capture_that_fails_leaves_training_as_it_was(monkeypatch):
    trainer, batch = sweep()
    gradients = trainer.step.gradients

    def waits(group):
        sums = gradients(group)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return sums

    monkeypatch.setattr(trainer.step, "gradients", waits)
    with pytest.warns(errors.FastLoRAWarning, match="without a CUDA graph"):
        for _ in range(WARM_UP + 2):
            trainer.step([batch])
    assert "capture failed" in trainer.step.plain
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not torch.equal(torch.rand(9, device=DEVICE), torch.rand(9, device=DEVICE)) or HOLLOW
