"""The choice of a path: pure, explained, never silent; and the gate that a kernel must pass before a GPU runs it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import check, choice, tuning
from fastlora.cache import read_json
from fastlora.choice import choose
from fastlora.errors import FastLoRAWarning
from fastlora.paths import PATHS
from fastlora.paths.problem import Layout, Problem

GPU = torch.device("cuda", 0)
PROBLEM = Problem(8192, 4096, 4096, 16, torch.bfloat16, torch.bfloat16, GPU, False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch has never seen: what the choice asks of the device, answered; no kernel runs."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for owner, name in ((check, "_verdicts"), (tuning, "_known"), (choice, "_selected")):
        monkeypatch.setattr(owner, name, {})
    monkeypatch.setattr(tuning, "_loaded", set())
    monkeypatch.setattr(tuning, "load", lambda path, problem: None)
    monkeypatch.setattr(tuning, "time_paths", lambda problem: row(torch=(1.0, 1.0)))


@pytest.fixture
def examined(monkeypatch):
    """The paths whose kernels were compared with the reference; each comparison succeeds."""
    names = []
    monkeypatch.setattr(check.Trial, "fault", lambda trial, path: names.append(path.name))
    return names


def row(**seconds):
    return tuning.Row(tuple(tuning.Timing(PATHS[name], *both) for name, both in seconds.items()))


def measured(path, captured=None):
    """As if an earlier process had found `path` to be the fastest, and `captured` in graphs."""
    found = row(torch=(3.0, 3.0)) if path == "torch" else row(**{path: (1.0, 2.0), captured or path: (2.0, 1.0)})
    if captured in (None, path):
        found = row(**{path: (1.0, 1.0), "torch": (3.0, 3.0)})
    tuning.write(tuning.store(GPU), {tuning.bucket(PROBLEM): found}, GPU)


def test_names():
    assert set(fastlora.paths()) == {"torch", "cpu", "hybrid", "onepass", "split", "cuda"}
    assert fastlora.paths("cpu")["torch"] == "usable"
    assert "TRITON_INTERPRET=1" in fastlora.paths("cpu")["split"]


def test_a_cpu_runs_a_path_of_its_own():
    chosen = choose(PROBLEM._replace(device=torch.device("cpu")))
    usable = fastlora.paths("cpu")["cpu"] == "usable"
    assert chosen.path == ("cpu" if usable else "torch") and "CPU" in chosen.reason
    chosen = choose(PROBLEM._replace(device=torch.device("cpu"), dtype=torch.float64))
    assert chosen.path == "torch" and ("float64" in chosen.reason or not usable)


def test_an_unknown_shape_is_timed_on_a_gpu_unless_the_user_forbids_it(gpu, examined, monkeypatch):
    monkeypatch.setattr(tuning, "time_paths", lambda problem: row(torch=(2.0, 2.0), hybrid=(1.0, 1.0)))
    monkeypatch.setenv("FASTLORA_AUTOTUNE", "0")
    assert choose(PROBLEM).path == "torch" and "FASTLORA_AUTOTUNE" in choose(PROBLEM).reason
    monkeypatch.delenv("FASTLORA_AUTOTUNE")
    chosen = choose(PROBLEM)
    assert chosen.path == "hybrid" and "1000000.0" in str(chosen) and "torch" in chosen.table
    assert examined == ["hybrid"]


def test_a_measured_path_runs_once_it_has_passed_its_check(gpu, examined):
    measured("split")
    assert choose(PROBLEM).path == choose(PROBLEM).path == "split"
    assert examined == ["split"]
    assert choose(PROBLEM._replace(M=8192 - 16)).path == "split"  # the same bucket and kernels
    assert examined == ["split"]
    assert choose(PROBLEM._replace(M=8191)).path == "split"  # the same bucket; Triton compiles other kernels
    assert examined == ["split", "split"]
    assert choose(PROBLEM._replace(M=4096)).path == "torch"  # another bucket


@pytest.mark.parametrize(
    "other", [{"N": 4080}, {"R": 40}, {"dropout": True}, {"layout": Layout((4096, 1), 2, (4096, 1), 0)}]
)
def test_every_kernel_that_differs_is_examined(gpu, examined, other):
    assert check.admit(PATHS["split"], PROBLEM) is None
    assert check.admit(PATHS["split"], PROBLEM._replace(**other)) is None
    tiles = PATHS["split"].tiles(PROBLEM)
    assert check.admit(PATHS["split"].with_tiles({"s": tiles["s"][-1]}), PROBLEM) is None
    assert len(examined) == 3


def test_a_check_takes_few_rows_but_launches_the_kernels_of_all(gpu, monkeypatch):
    split = tuning.pin(PATHS["split"], PROBLEM)
    for M in (1, 17, 2000, 8192, 100_001):
        problem = PROBLEM._replace(M=M)
        few = check._rows(split, problem)
        assert few <= M and few % 16 == M % 16
        assert check._kernels_of(split, problem._replace(M=few)) == check._kernels_of(split, problem)
    assert few < 40_000
    gemms = [one for one in split.launches(split, PROBLEM._replace(M=few)) if one.fn.__name__.startswith("gemm_")]
    assert gemms and all(gemm.turns > 1 for gemm in gemms)  # the persistent grid's second tile
    monkeypatch.setattr("fastlora.kernels.tiles._multiprocessors_of_index", lambda index: 132)
    narrow = PROBLEM._replace(M=1 << 20, N=256)
    assert check._rows(PATHS["cuda"], narrow) == 64 * 1024  # 264 tiles of 128 rows are 33,792
    assert check._rows(PATHS["cuda"], PROBLEM) == 4096 and check._rows(PATHS["cuda"], PROBLEM._replace(M=40)) == 40


def test_a_path_that_fails_its_check_is_disabled_with_a_warning(gpu, monkeypatch):
    measured("split")
    monkeypatch.setattr(check.Trial, "fault", lambda trial, path: "dA: error 7 in its norm, over the limit of 1")
    with pytest.warns(FastLoRAWarning, match="failed its self-check"):
        chosen = choose(PROBLEM)
    assert chosen.path == "torch" and "dA: error 7" in chosen.reason
    with pytest.raises(RuntimeError, match="path 'split' cannot run here: dA: error 7"):
        choice._forced(PROBLEM, "split")


def test_a_verdict_is_kept_per_machine_and_a_damaged_one_is_not_trusted(gpu, examined, monkeypatch):
    onepass = PATHS["onepass"]
    for _ in range(2):  # a second process starts with nothing in memory
        monkeypatch.setattr(check, "_verdicts", {})
        assert check.admit(onepass, PROBLEM) is None
    assert examined == ["onepass"]
    before = check._store(onepass, GPU, check._subject(onepass, PROBLEM))
    before.write_text("{")
    monkeypatch.setattr(check, "_verdicts", {})
    assert check.admit(onepass, PROBLEM) is None and examined == ["onepass", "onepass"]
    monkeypatch.setattr(check, "_driver", lambda device: "a newer one")
    assert check._store(onepass, GPU, check._subject(onepass, PROBLEM)) != before


@pytest.mark.parametrize("kind", ["deep", "20 GB", "escapes", "device", "pipe", "folder"])
def test_what_is_no_verdict_of_ours_is_not_trusted(gpu, examined, kind):
    store = check._store(PATHS["onepass"], GPU, check._subject(PATHS["onepass"], PROBLEM))
    store.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(store)
    elif kind == "device":
        store.symlink_to("/dev/zero")
    elif kind == "folder":
        store.mkdir()
    else:
        store.write_text("[" * 60_000 if kind == "deep" else json.dumps({"reason": "\x1b[2J\n"}))
        if kind == "20 GB":
            os.truncate(store, 20 << 30)
    with pytest.warns(FastLoRAWarning, match="not be kept") if kind == "folder" else contextlib.nullcontext():
        assert check.admit(PATHS["onepass"], PROBLEM) is None
    assert [path.name for path in store.parent.iterdir()] == [store.name]
    assert kind == "folder" or read_json(store) == {"path": "onepass", "reason": None}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("ptxas died")])
def test_an_error_on_the_way_to_a_verdict_is_not_kept_on_disk(gpu, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(check, "drawn", fail)
    monkeypatch.setattr(check, "apart", lambda device, function, *arguments: function(*arguments))
    monkeypatch.setattr("fastlora.errors._said", set())
    trial = check.Trial(PROBLEM)
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    with contextlib.nullcontext() if out_of_memory else pytest.warns(FastLoRAWarning, match="ptxas died"):
        assert str(error) in check.admit(PATHS["split"], PROBLEM, trial)
    assert trial.failed and not (check.env.cache_dir() / "selfcheck").exists()
    assert (check._verdicts == {}) == out_of_memory


@pytest.mark.parametrize("how", ["captured", "deterministic", "in a compiler", "off"])
def test_where_nothing_may_be_timed_the_best_by_prediction_runs_of_those_admitted(gpu, examined, monkeypatch, how):
    monkeypatch.setattr(tuning, "time_paths", lambda problem: pytest.fail("timed"))
    for names in ([], ["hybrid"], ["hybrid", "split"]):  # admitted by eager calls before
        for name in names:
            assert check.admit(tuning.pin(PATHS[name], PROBLEM), PROBLEM) is None
        with monkeypatch.context() as here:
            before = len(examined)
            if how == "captured":
                here.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            elif how == "deterministic":
                here.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
            elif how == "in a compiler":
                here.setattr(torch.compiler, "is_compiling", lambda: True)
            else:
                here.setenv("FASTLORA_AUTOTUNE", "0")
            chosen = choose(PROBLEM)
        assert chosen.path == ["torch", *names][-1] and "by prediction" in chosen.reason
        assert len(examined) == before  # nothing was compiled or run to choose
    small = PROBLEM._replace(M=64, N=64, K=64)  # the host's time decides, and ATen is asked for least of it
    monkeypatch.setattr(check, "admitted", lambda *_, **__: True)
    monkeypatch.setattr(choice, "NODE", None)
    monkeypatch.setenv("FASTLORA_AUTOTUNE", "0")
    assert choose(small).path == "torch"


def test_a_captured_call_has_a_winner_of_its_own(gpu, examined, monkeypatch):
    measured("onepass", captured="split")
    assert choose(PROBLEM).path == "onepass" and set(examined) == {"onepass", "split"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(PROBLEM).path == "split"
    monkeypatch.setattr(check, "_verdicts", {})  # another process, where it is not loaded
    assert choose(PROBLEM).path == "torch"


def test_no_check_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "run the call once before" in check.admit(PATHS["split"], PROBLEM)
    assert check._verdicts == {}


def test_a_read_only_cache_costs_only_time(gpu, examined, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FASTLORA_CACHE", str(blocked))
    monkeypatch.setattr("fastlora.errors._said", set())
    with pytest.warns(FastLoRAWarning, match="could not be kept"):
        assert check.admit(PATHS["onepass"], PROBLEM) is None


def test_nothing_to_multiply_is_for_aten_on_a_gpu(gpu):
    assert choose(PROBLEM._replace(M=0)).reason.startswith("M, N or K is 0")


def test_selfcheck_runs_the_torch_path_for_real():
    verdicts = fastlora.selfcheck("cpu")
    assert verdicts["torch"] == "ok" and "TRITON_INTERPRET" in verdicts["split"]


@pytest.mark.parametrize("operation", ["mm", "addmm_"])
def test_selfcheck_finds_a_broken_torch_path(monkeypatch, operation):
    owner = torch if operation == "mm" else torch.Tensor
    real = getattr(owner, operation)
    monkeypatch.setattr(owner, operation, lambda *a, **k: real(*a, **k).mul_(1.01))
    assert "error" in check.examine(PATHS["torch"], torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selfcheck_examines_every_dtype_and_the_paths_own_cases(dtype):
    """A path that is wrong in one of them only."""
    aten = PATHS["torch"]

    def broken(x, weight, bias, update):
        y, S = aten.forward(x, weight, bias, update)
        return (y * 1.1 if x.dtype is dtype and x.shape != (9, 9) else y), S

    assert str(dtype)[6:] in check.examine(replace(aten, forward=broken), torch.device("cpu"))
    own = replace(
        aten,
        cases=((9, 8, 9, 2, 0.0, dtype, dtype),),
        forward=lambda x, *rest: aten.forward(x * 1.1 if x.shape == (9, 9) else x, *rest),
    )
    assert "M=9 N=8" in check.examine(own, torch.device("cpu"))


def test_the_first_call_may_be_inside_a_checkpoint(monkeypatch):
    """Whose hooks count the tensors that are saved, those of a self-check too."""
    monkeypatch.setattr(check, "_verdicts", {})
    choice.forget()
    layer, x = fastlora.FusedLoRALinear(8, 6, r=2), torch.randn(3, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.lora_B.grad.any() and all(verdict is None for verdict in check._verdicts.values())


def test_forced_by_the_environment(monkeypatch):
    layer, x = fastlora.FusedLoRALinear(8, 6, r=2), torch.randn(3, 8)
    monkeypatch.setenv("FASTLORA_PATH", "split")
    with pytest.raises(RuntimeError, match=r"path 'split' \(named by FASTLORA_PATH\) cannot run here"):
        layer(x)
    monkeypatch.setenv("FASTLORA_PATH", "torch")
    assert layer(x).shape == (3, 6)
    assert str(fastlora.explain(layer, x)) == "torch: FASTLORA_PATH asks for it"
    monkeypatch.setenv("FASTLORA_PATH", "warp")
    with pytest.raises(ValueError, match="'warp'"):
        layer(x)


def test_explain():
    layer = fastlora.FusedLoRALinear(8, 6, r=2)
    said = fastlora.explain(layer, torch.randn(3, 8))
    assert said.path in ("cpu", "torch") and "CPU" in said.reason
    with pytest.raises(TypeError, match="Linear"):
        fastlora.explain(torch.nn.Linear(8, 6), torch.randn(3, 8))


LIGHT_IMPORT = """
import sys, fastlora, torch
assert not {"triton", "peft", "transformers", "pandas"} & set(sys.modules), "a heavy import"
assert not torch.cuda.is_initialized()
"""


def test_import_asks_no_gpu_and_loads_no_triton():
    subprocess.run([sys.executable, "-c", LIGHT_IMPORT], check=True)
