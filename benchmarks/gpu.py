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
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, measure, plots, report, suite
from fastlora import choice
from fastlora.cache import write_json
from fastlora.errors import UserError, WorkError

RESERVE_S = 12.0  # for the figure and the last table
SHOWN = 24  # cases in it
SELFCHECK = "import fastlora; print(fastlora.selfcheck('cuda'))"


@dataclass(frozen=True)
class Step:
    """A step of the run. `share`: the most of the budget that it takes; `work`: (seconds, folder) -> what it found."""

    name: str
    what: str
    share: float
    work: Callable[[float, Path | None], str]
    stops_when_red: bool = False


def _tests(seconds: float, _) -> str:
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark", "--durations=5"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels, on the host
        options += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2))), "--dist", "loadgroup"]
    status, output = _command([sys.executable, "-m", "pytest", "tests/gpu", *options], seconds)
    print(output[-6000:], flush=True)
    if status != 0:
        raise WorkError("out of time" if status is None else f"pytest ended with status {status}")
    return output.strip().splitlines()[-1].strip("= ")


def _selfcheck(*_) -> str:
    device = torch.device("cuda")
    found = choice.selfcheck(device)
    wrong = {name: why for name, why in found.items() if why != "ok" and not choice.PATHS[name].why_not(device, None)}
    if wrong:
        raise WorkError("; ".join(f"{name}: {why}" for name, why in wrong.items()))
    return ", ".join(f"{name} {why}" for name, why in found.items())


def _sanitizer(seconds: float, _) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "left out: compute-sanitizer is not installed"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an overrun stays inside a cached block
    end, done = time.perf_counter() + seconds, []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--report-api-errors", "no", "--error-exitcode", "9"]
        status, output = _command([*command, sys.executable, "-c", SELFCHECK], end - time.perf_counter(), environment)
        print("\n".join(line for line in output.splitlines() if "ERROR" in line)[-2000:], flush=True)
        if status == 9:
            raise WorkError(f"{check} found errors:\n{output[-3000:]}")
        done.append(f"{check} {'clean' if status == 0 else 'out of time' if status is None else f'status {status}'}")
        if status is None:
            break
    return ", ".join(done)


def _suite(seconds: float, folder: Path | None) -> str:
    jobs = cases.gpu_jobs()
    path, payload = suite.run(jobs, torch.device("cuda"), seconds, folder)
    plots.draw(payload, path.with_suffix(".png"))
    for mode in (cases.PLAIN, cases.GRAPH):  # bound by the host, and captured
        groups = report.grouped(payload["rows"], cases.TRAIN, mode)
        print(f"\n{cases.TRAIN}, {mode}:\n{report.table(dict(list(groups.items())[:SHOWN]))}")
    print(f"\n{report.means(payload['rows'])}\n\nraw: {path}")
    return f"{len(jobs) - len(payload['left_out'])} jobs measured, {len(payload['left_out'])} left out"


STEPS = (
    Step("tests", "correctness on this device: pytest tests/gpu", 0.30, _tests, stops_when_red=True),
    Step("self-check", "each path against the reference", 0.06, _selfcheck, stops_when_red=True),
    Step("sanitizer", "compute-sanitizer memcheck, then racecheck, over the self-check", 0.16, _sanitizer),
    Step("suite", "the suite in order of importance, until the budget ends", 1.0, _suite),
)


def schedule(budget_s: float) -> str:
    """What `main` will do, with the most that each step may take; the suite gets whatever the others leave."""
    lines = [f"budget {budget_s:.0f} s"]
    for step in STEPS:
        most = "what is left" if step.share == 1.0 else f"at most {step.share * budget_s:.0f} s"
        lines.append(f"{step.name:<11} {most:<15} {step.what}" + "; a failure stops the run" * step.stops_when_red)
    jobs = cases.gpu_jobs()
    return "\n".join([*lines, f"suite: {len(jobs)} jobs, first {', '.join(job.name for job in jobs[:3])}"])


def main(budget_s: float, dry_run: bool = False, folder: Path | None = None) -> int:
    """Run the steps; 1 when a step failed; red tests or a red self-check end it at once.

    Raises:
        UserError: there is no GPU here.
    """
    if dry_run:
        print(schedule(budget_s))
        return 0
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: torch.cuda.is_available() is False; --dry-run prints the steps")
    start = time.perf_counter()
    end = start + budget_s - RESERVE_S
    payload = {"kind": "gpu-run", "metadata": measure.metadata("cuda"), "budget_s": budget_s, "steps": []}
    path = measure.write_results("gpu-run", payload, folder)
    print(f"{payload['metadata']['device_name']}, torch {torch.__version__}\n{schedule(budget_s)}", flush=True)
    red = False
    for step in STEPS:
        began = time.perf_counter()
        allowed = min(step.share * budget_s, end - began)
        print(f"\n== {step.name}: {allowed:.0f} s at most", flush=True)
        try:
            status = step.work(allowed, folder) if allowed > 1 else "left out: the budget is spent"
        except WorkError as error:
            status, red = f"FAILED: {error}", True
        seconds = time.perf_counter() - began
        payload["steps"].append({"name": step.name, "status": status, "seconds": seconds})
        write_json(path, payload)
        print(f"== {step.name}: {status} ({seconds:.0f} s)", flush=True)
        if step.stops_when_red and status.startswith("FAILED"):
            print(f"\nstopped: a red {step.name} makes every time meaningless")
            return 1
    print()
    for step in payload["steps"]:
        print(f"{step['name']:<11} {step['seconds']:5.0f} s  {step['status'].splitlines()[0][:110]}")
    print(f"{time.perf_counter() - start:.0f} s of {budget_s:.0f} s; steps: {path}")
    return int(red)


def _command(command: list[str], seconds: float, environment: dict | None = None) -> tuple[int | None, str]:
    """Run in the repository's root; exit status (None: out of time, and its children were ended too) and output."""
    process = subprocess.Popen(
        command, cwd=measure.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output
