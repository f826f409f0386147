"""Everything a GPU machine is needed for, in one command and inside a budget; what matters most comes first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import cases, measure
from fastlora.errors import UserError, WorkError

RESERVE_S = 12.0  # for the figure and the last table
RED = 1


@dataclass(frozen=True)
class Step:
    """One step of the run: its name, what it does, and the share of the budget it may take at most."""

    name: str
    what: str
    share: float
    stops_when_red: bool = False


STEPS = (
    Step("tests", "correctness on this device: pytest tests/gpu", 0.30, stops_when_red=True),
    Step("self-check", "each path against the reference", 0.06, stops_when_red=True),
    Step("sanitizer", "compute-sanitizer memcheck, then racecheck, over a small case of each path", 0.16),
    Step("tune", "time every usable path and write this device's table", 0.18),
    Step("suite", "the suite in order of importance, until the budget ends", 1.0),
)


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float


def plan(budget_s: float) -> str:
    """What `main` will do, with the most that each step may take; the suite gets whatever the others leave."""
    lines = [f"budget {budget_s:.0f} s"]
    for step in STEPS:
        most = "what is left" if step.share == 1.0 else f"at most {step.share * budget_s:.0f} s"
        lines.append(f"{step.name:<11} {most:<15} {step.what}" + ("; a failure stops the run" * step.stops_when_red))
    jobs = cases.gpu_jobs()
    lines.append(f"suite: {len(jobs)} jobs, first {', '.join(job.name for job in jobs[:3])}")
    return "\n".join(lines)


def main(budget_s: float, dry_run: bool = False, folder: Path | None = None) -> int:
    """Run the steps; 1 when a step failed; red tests or a red self-check end it at once.

    Raises:
        UserError: there is no GPU here.
    """
    if dry_run:
        print(plan(budget_s))
        return 0
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: torch.cuda.is_available() is False; --dry-run prints the plan")
    start = time.perf_counter()
    end = start + budget_s - RESERVE_S
    payload = {"kind": "gpu-run", "metadata": measure.metadata("cuda"), "budget_s": budget_s, "steps": []}
    path = measure.write_results("gpu-run", payload, folder)
    print(f"{payload['metadata']['device_name']}, torch {torch.__version__}\n{plan(budget_s)}", flush=True)
    suite_result: list = []
    work: dict[str, Callable[[float], str]] = {
        "tests": _tests,
        "self-check": _selfcheck,
        "sanitizer": _sanitizer,
        "tune": lambda seconds: _tune(seconds, folder),
        "suite": lambda seconds: _suite(seconds, folder, suite_result),
    }
    for step in STEPS:
        began = time.perf_counter()
        allowed = min(step.share * budget_s, end - began)
        print(f"\n== {step.name}: {allowed:.0f} s at most", flush=True)
        try:
            status = work[step.name](allowed) if allowed > 1 else "left out: the budget is spent"
        except WorkError as error:
            status = f"FAILED: {error}"
        outcome = Outcome(step.name, status, time.perf_counter() - began)
        payload["steps"].append(asdict(outcome))
        measure.write_json(path, payload)
        print(f"== {step.name}: {status} ({outcome.seconds:.0f} s)", flush=True)
        if step.stops_when_red and status.startswith("FAILED"):
            print(f"\nstopped: a red {step.name} makes every time meaningless")
            return RED
    _conclude(payload["steps"], suite_result)
    print(f"{time.perf_counter() - start:.0f} s of {budget_s:.0f} s; steps: {path}")
    return int(any(step["status"].startswith("FAILED") for step in payload["steps"]))


def _tests(seconds: float) -> str:
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark", "--durations=5"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels, on the host
        options += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))]
    status, output = _command([sys.executable, "-m", "pytest", "tests/gpu", *options], seconds)
    print(output[-6000:], flush=True)
    if status is None:
        raise WorkError(f"the tests did not end within {seconds:.0f} s")
    if status != 0:
        raise WorkError(f"pytest ended with status {status}")
    return output.strip().splitlines()[-1].strip("= ")


def _selfcheck(_: float) -> str:
    from fastlora.dispatch import registry, selfcheck

    results = selfcheck("cuda")
    wrong = {
        name: reason
        for name, reason in results.items()
        if reason != "ok" and not registry.load(name).unavailable(torch.device("cuda"))
    }
    if wrong:
        raise WorkError("; ".join(f"{name}: {reason}" for name, reason in wrong.items()))
    return ", ".join(f"{name} {reason}" for name, reason in results.items())


def _sanitizer(seconds: float) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "left out: compute-sanitizer is not installed"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an overrun stays inside a cached block
    end, done = time.perf_counter() + seconds, []
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.sanitize",
        ]
        status, output = _command(command, end - time.perf_counter(), environment)
        print("\n".join(line for line in output.splitlines() if "ERROR" in line or "ran" in line)[-2000:], flush=True)
        if status == 9:
            raise WorkError(f"{check} found errors:\n{output[-3000:]}")
        done.append(f"{check} {'clean' if status == 0 else 'out of time' if status is None else f'status {status}'}")
        if status is None:
            break
    return ", ".join(done)


def _tune(seconds: float, folder: Path | None) -> str:
    from benchmarks import tune
    from fastlora.dispatch import registry, table

    tune.main(seconds, None, folder)
    file = table.FOLDER / f"{table.device_class(torch.device('cuda'))}.json"
    if folder is not None and file.exists():
        shutil.copy(file, folder / file.name)
    table._rows.cache_clear()
    registry.selected.clear()
    return f"table {file.name}"


def _suite(seconds: float, folder: Path | None, result: list) -> str:
    from benchmarks import suite

    path, payload = suite.run(cases.gpu_jobs(), torch.device("cuda"), seconds, folder)
    result.append((path, payload))
    left = len(payload["left_out"])
    return f"{len(cases.gpu_jobs()) - left} jobs measured, {left} left out"


def _conclude(steps: list[dict], suite_result: list) -> None:
    """The short table, last."""
    from benchmarks import plots, report

    print()
    for path, payload in suite_result:
        plots.draw(payload, path.with_suffix(".png"))
        print(report.short(payload["rows"]), end="\n\n")
        print(report.means(payload["rows"]), end="\n\n")
        print(f"raw: {path}")
    for step in steps:
        print(f"{step['name']:<11} {step['seconds']:5.0f} s  {step['status'].splitlines()[0][:110]}")


def _command(command: list[str], seconds: float, environment: dict | None = None) -> tuple[int | None, str]:
    """Run in the repository's root; exit status (None: out of time, and its children were ended too) and output."""
    process = subprocess.Popen(
        command,
        cwd=measure.ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output
