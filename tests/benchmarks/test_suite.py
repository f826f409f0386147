"""Cases, contenders and the runner on tiny layers, and the commands around them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, contenders, gpu, measure, model, runner, several, suite
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, PLAIN, TRAIN, Case, Job
from benchmarks.contenders import CONTENDERS
from fastlora import reference
from fastlora.paths import PATHS

CPU = torch.device("cpu")
OF_VARIANTS = ("peft-lora", "fastlora-lora", "fastlora-apart")
TINY = Case("tiny", 8, 12, 16, 2, "float32", 0.0)


@pytest.mark.parametrize("jobs", [cases.cpu_jobs(), cases.gpu_jobs()], ids=["cpu", "gpu"])
def test_jobs_are_named_once_and_ordered_by_importance(jobs):
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert [job.rank for job in jobs] == sorted(job.rank for job in jobs)


def test_the_gpu_suite_has_every_shape_that_was_promised():
    shapes = {(job.case.M, job.case.K, job.case.N, job.case.R) for job in cases.gpu_jobs()}
    assert set(cases.CLASSIFIER) <= shapes
    assert {(M, K, K, 16) for M in (2048, 4096, 8192) for K in (4096, 5120, 8192)} <= shapes
    assert {(M, 4096, 14336, 16) for M in (1, 16, 512, 2048, 8192, 16384)} <= shapes
    assert {(4096, 4096, 4096, R) for R in (4, 16, 64, 128)} <= shapes
    assert cases.gpu_jobs()[0].name == "lorafusion-8192x4096x4096-r16-bf16-p0.1/forward+backward"


def test_the_quick_suite_is_a_spread_without_compiling():
    for jobs in (cases.cpu_jobs(), cases.gpu_jobs()):
        chosen = cases.quick(jobs)
        assert len(chosen) == 16 and len({job.case.dtype for job in chosen}) > 1
        assert not any(cases.COMPILED in job.modes for job in chosen)


def test_patterns_select_by_case_or_job():
    jobs = cases.cpu_jobs()
    assert {job.direction for job in cases.select(jobs, ["classifier-64x100x128-r2-f32"])} == {TRAIN, FORWARD}
    assert [job.direction for job in cases.select(jobs, ["*64x100x128-r2-f32/forward"])] == [FORWARD]
    assert cases.select(jobs, ["nothing"]) == []


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    "name", [name for name in CONTENDERS if name not in {"bare", "lorafusion", *PATHS, *OF_VARIANTS} - {"torch"}]
)
def test_every_contender_computes_the_same_step(name, dtype):
    if name.startswith("peft"):
        pytest.importorskip("peft")
    case = Case("tiny", 8, 12, 16, 2, dtype, 0.0)
    (inputs,) = contenders.draw(case, 1, CPU)
    (call,) = CONTENDERS[name].calls(case, [inputs], False)
    wide = [t.detach().double().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]
    truth = reference.lora_linear(wide[0], inputs.weight.double(), *wide[1:], inputs.bias.double(), contenders.SCALING)
    expected = (truth, *torch.autograd.grad(truth, wide, inputs.dy.double()))
    for got, true in zip((call.forward(), *call.train()), expected, strict=True):
        assert torch.linalg.vector_norm(got.double() - true) <= 8 * torch.finfo(case.torch_dtype).eps * (
            torch.linalg.vector_norm(true)
        )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", range(3), ids=["nf4", "dora", "nf4-dora"])
def test_a_variants_contenders_compute_the_same_and_are_predicted(variant, dropout):
    pytest.importorskip("bitsandbytes")
    case = cases.variants(replace(TINY, K=64, dropout=dropout))[variant]
    names = contenders.names(case, CPU)
    assert set(names) == {"bare", "eager", "peft", "fastlora", *(["peft-lora", "fastlora-lora"] if case.dora else [])}
    made = {}
    for name in names:
        (call,) = CONTENDERS[name].calls(replace(case, dropout=0.0), contenders.draw(case, 1, CPU), False)
        made[name] = [call.forward(), *call.train()]
    assert len(made["peft"]) == len(made["fastlora"]) == 4 + case.dora
    for mine, theirs in [("fastlora", "peft"), ("fastlora", "eager")] + [("fastlora-lora", "peft-lora")] * case.dora:
        for got, want in zip(made[mine], made[theirs], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert case.dora != torch.allclose(made["fastlora"][1], made.get("fastlora-lora", made["fastlora"])[1])
    ceilings = model.Ceilings(1e10, {"float32": 1e11})
    rows = {row["contender"]: row for row in runner.run_job(Job(case, TRAIN, 0), CPU, 0.0, ceilings)}
    assert not any("skipped" in row for row in rows.values())
    assert rows["fastlora"]["predicted_over_bare"] > 1 and ("predicted" in rows["peft"]) != case.dora


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("which", range(2), ids=["adapters", "projections"])
def test_several_at_once_compute_what_they_do_apart_and_are_predicted(which, dropout):
    case = cases.several(replace(TINY, K=64, dropout=dropout))[which]
    names = contenders.names(case, CPU)
    assert names == ["bare", "eager", "fastlora-apart", "fastlora"]
    parts = several.Parts(case, contenders.draw(case, 1, CPU)[0])
    parts.case = replace(case, dropout=0.0)
    found = {}
    for how in (parts.together(), parts.apart(reference.lora_linear)):
        call, leaves, dy = how
        y = call()
        gradients = torch.autograd.grad(y, leaves, dy)
        dx, rest = gradients[: len(leaves) - len(parts.adapters)], gradients[-len(parts.adapters) :]
        y = y if isinstance(y, torch.Tensor) else torch.cat(y)
        found[len(found)] = [y, torch.cat(dx), *rest]
    for got, want in zip(*found.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    ceilings = model.Ceilings(1e10, {"float32": 1e11})
    rows = {row["contender"]: row for row in runner.run_job(Job(case, TRAIN, 0), CPU, 0.0, ceilings)}
    assert not any("skipped" in row for row in rows.values())
    assert 1 < rows["fastlora"]["predicted_over_bare"] < rows["eager"]["predicted_over_bare"]


@pytest.mark.parametrize("name", ["eager", "peft", "optimised", "torch", "fastlora"])
def test_every_contender_really_drops(name):
    case = Case("tiny", 8, 12, 16, 2, "float32", 0.5)
    (call,) = CONTENDERS[name].calls(case, contenders.draw(case, 1, CPU), False)
    assert not torch.equal(call.forward(), call.forward())


def test_a_job_gives_a_row_for_each_contender():
    rows = runner.run_job(Job(TINY, TRAIN, 0), CPU, 0.0)
    missing = {row["contender"] for row in rows if "skipped" in row}
    assert missing <= {"cpu"}  # where the kernels were not compiled
    found = {row["contender"]: row for row in rows if "skipped" not in row}
    assert found.keys() == {"bare", "eager", "peft", "optimised", "torch", "cpu", "fastlora"} - missing
    for row in found.values():
        assert row["p20"] <= row["median"] <= row["p80"]
        assert {"over_bare", "over_eager", "tflops", "bytes_per_s", "peak_memory_bytes"} <= row.keys()
        assert row["peak_memory_bytes"] >= TINY.M * TINY.N * 4
    assert found["fastlora"]["path"] == contenders.chosen_path(TINY, CPU)
    assert found["bare"]["over_bare"]["median"] == 1.0


def test_a_contender_that_fails_is_skipped_with_its_reason_and_the_others_run(monkeypatch):
    monkeypatch.setattr(contenders._Optimised, "forward", lambda *_: 1 / 0)
    rows = {row["contender"]: row for row in runner.run_job(Job(TINY, FORWARD, 0), CPU, 0.0)}
    assert "ZeroDivisionError" in rows["optimised"]["skipped"]
    assert rows["fastlora"]["median"] > 0


def test_a_contender_needs_no_plan_of_its_traffic(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "newcomer", contenders.Contender("newcomer", CONTENDERS["eager"].calls))
    ceilings = model.Ceilings(1e10, {"float32": 1e11})
    rows = {row["contender"]: row for row in runner.run_job(Job(TINY, TRAIN, 0), CPU, 0.0, ceilings)}
    assert rows["newcomer"]["median"] > 0 and rows["newcomer"]["tflops"] > 0
    assert "predicted" in rows["eager"] and not {"predicted", "bytes_per_s"} & rows["newcomer"].keys()


def test_every_path_is_a_contender_where_it_may_run():
    gpu_names = contenders.names(TINY, torch.device("cuda"))
    assert gpu_names[0] == "bare" and {"eager", "fastlora", *PATHS} - {"cpu"} <= set(gpu_names)
    assert not {"cpu", "fastlora-float32"} & set(gpu_names)
    assert PATHS.keys() & contenders.names(TINY, CPU) == {"torch", "cpu"}


def test_inputs_rotate():
    sets = contenders.draw(TINY, 3, CPU)
    entry = runner.build("eager", PLAIN, Job(TINY, FORWARD, 0), sets, CPU)
    first = [entry.step() for _ in range(3)]
    assert not torch.equal(first[0], first[1]) and torch.equal(first[0], entry.step())
    large = Case("large", 4096, 4096, 4096, 16, "bfloat16", 0.0)
    assert runner.set_count(Job(large, TRAIN, 0), torch.device("cuda")) >= 2


def test_the_file_is_there_after_every_job_and_names_what_was_left_out(tmp_path, monkeypatch):
    jobs = [Job(TINY, FORWARD, 0), Job(TINY, TRAIN, 1)]
    seen = []

    def run_job(job, *_):
        (file,) = tmp_path.glob("*.json")
        seen.append(json.loads(file.read_text()))
        return [{"case": TINY.name, "direction": job.direction, "contender": "bare", "mode": PLAIN, "median": 1.0}]

    monkeypatch.setattr(suite, "run_job", run_job)
    monkeypatch.setattr(suite.model, "measure_ceilings", lambda _: suite.model.Ceilings(1e10, {"float32": 1e11}))
    monkeypatch.setattr(measure, "warm_clocks", lambda *_: None)
    monkeypatch.setattr(suite, "choosing_seconds", lambda _: 1e-6)
    path, payload = suite.run(jobs, CPU, math.inf, tmp_path)
    assert [len(one["rows"]) for one in seen] == [0, 1]
    assert payload["left_out"] == [] and len(json.loads(path.read_text())["rows"]) == 2
    _, nothing = suite.run(jobs, CPU, 0.0, tmp_path / "no time")
    assert nothing["left_out"] == [job.name for job in jobs]


def test_without_a_gpu_the_gpu_run_says_so_and_plans_dry(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert main(["gpu", "--dry-run", "--budget", "300"]) == 0
    planned = capsys.readouterr().out
    assert all(step.name in planned for step in gpu.STEPS) and "budget 300 s" in planned


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """The GPU run with every step replaced by one that takes all the time it is allowed."""
    clock, done = Clock(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "metadata", lambda _=None: {"device": "x", "device_name": "x", "date": "2026"})
    monkeypatch.setattr(gpu.time, "perf_counter", clock)

    def spend(name, result="done"):
        def work(seconds, _):
            clock.now += seconds
            done.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        steps = [replace(step, work=work) if step.name == name else step for step in gpu.STEPS]
        monkeypatch.setattr(gpu, "STEPS", tuple(steps))

    for step in gpu.STEPS:
        spend(step.name)
    return clock, done, spend, tmp_path


def test_the_gpu_run_ends_inside_its_budget(pretended_gpu, capsys):
    clock, done, _, folder = pretended_gpu
    assert gpu.main(540.0, folder=folder) == 0
    assert done == ["tests", "self-check", "sanitizer", "suite"]
    assert clock.now <= 540.0 - gpu.RESERVE_S
    (file,) = folder.glob("*-gpu-run.json")
    assert [step["name"] for step in json.loads(file.read_text())["steps"]] == done


def test_a_red_test_stops_the_gpu_run_and_another_failure_is_its_status(pretended_gpu, capsys):
    _, done, spend, folder = pretended_gpu
    spend("sanitizer", gpu.WorkError("memcheck found errors"))
    assert gpu.main(540.0, folder=folder) == 1 and done[-1] == "suite"
    done.clear()
    spend("tests", gpu.WorkError("pytest ended with status 1"))
    assert gpu.main(540.0, folder=folder) == 1 and done == ["tests"]
    assert "stopped" in capsys.readouterr().out


def test_launches_are_counted_between_the_spinning_kernels():
    assert runner.counts(["fill", "spin_kernel", "gemm", "add", "spin_kernel", "gemm"], 2) == [2, 1]
    assert runner.counts(["spin_kernel", "gemm"], 2) == [None, None]


def test_a_job_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    def run_job(job, *_):
        if job.direction == FORWARD:
            raise ZeroDivisionError("no luck")
        return [{"case": TINY.name, "direction": job.direction, "contender": "bare", "mode": PLAIN, "median": 1.0}]

    monkeypatch.setattr(suite, "run_job", run_job)
    monkeypatch.setattr(suite.model, "measure_ceilings", lambda _: suite.model.Ceilings(1e10, {"float32": 1e11}))
    monkeypatch.setattr(measure, "warm_clocks", lambda *_: None)
    monkeypatch.setattr(suite, "choosing_seconds", lambda _: 1e-6)
    _, payload = suite.run([Job(TINY, FORWARD, 0), Job(TINY, TRAIN, 1)], CPU, math.inf, tmp_path)
    assert payload["failed"] == {f"{TINY.name}/{FORWARD}": "ZeroDivisionError: no luck"}
    assert len(payload["rows"]) == 1 and payload["left_out"] == []


def test_a_command_out_of_time_is_ended_and_said_so():
    status, output = gpu._command([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], 1.0)
    assert status is None and output.strip() in ("1", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "nothing-like-it"], "nothing-like-it"),
        (["--device", "toaster"], "toaster"),
        (["--contenders", "nobody"], "nobody"),
    ],
)
def test_users_mistakes_are_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
