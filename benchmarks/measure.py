"""What every measurement shares: the device it ran on, interleaved timing, and where results are written."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path

import torch

from fastlora.cache import write_json
from fastlora.node import NODE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS = ("torch", "triton", "peft", "transformers", "bitsandbytes", "numpy")
CPU_SAMPLE_S = 2e-4  # one sample is as many calls as last this long: far above the clock's grain
CUDA_SAMPLE_S = 2e-3  # and above the cost of a synchronisation
HIDE_LAUNCH_CYCLES = 200_000  # about 0.1 ms in which the host runs ahead of a sample of a few long calls


def metadata(device: str | torch.device | None = None) -> dict:
    """Device, driver, versions, commit and date: what a reader needs to place a number, JSON-able.

    `device` defaults to the GPU if there is one, else the CPU.
    """
    device = default_device() if device is None else torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_slug(device),
        "device_name": device_name(device),
        **(_cuda_facts(device) if device.type == "cuda" else _cpu_facts()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "fastlora", "benchmarks/*.py", "csrc")),
    }


def interleave(
    contenders: dict[str, Callable[[], object]],
    budget_s: float,
    *,
    device: str | torch.device | None = None,
    min_rounds: int = 5,
    max_rounds: int = 200,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time each callable in rounds, every contender once per round in a shuffled order: {name: seconds per call}.

    Whatever drifts (clocks, neighbours, temperature) falls on all alike, and sample `i` of every contender comes from
    the same round, so that ratios may be taken round by round. Runs until `budget_s` seconds have passed and at least
    `min_rounds` rounds are done, at most `max_rounds`. A sample is the mean over as many calls as its clock needs:
    events on CUDA, with the device idle at its start, the host's clock elsewhere. Warm-up calls are not counted.
    """
    device = default_device() if device is None else torch.device(device)
    end = time.perf_counter() + budget_s
    least, sample = (CUDA_SAMPLE_S, _cuda_sample) if device.type == "cuda" else (CPU_SAMPLE_S, _cpu_sample)
    calls = {name: _calls_per_sample(fn, sample, least) for name, fn in contenders.items()}
    order, shuffler = list(contenders), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(max_rounds):
        if round_number >= min_rounds and time.perf_counter() >= end:
            break
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(sample(contenders[name], calls[name]))
    return samples


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of samples, and how many there were."""
    several = seconds if len(seconds) > 1 else [*seconds, *seconds]
    p20, *_, p80 = statistics.quantiles(several, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": p20, "p80": p80, "samples": len(seconds)}


def ratio(seconds: list[float], over: list[float]) -> dict[str, float]:
    """`summary` of the ratio of two contenders of one interleaved run, taken round by round."""
    return summary([mine / other for mine, other in zip(seconds, over, strict=True)])


def warm_clocks(device: str | torch.device, seconds: float = 0.5) -> None:
    """Keep the device busy with a matrix product until its clocks have settled."""
    size, dtype = (4096, torch.bfloat16) if torch.device(device).type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(a.device)


def write_results(name: str, payload: dict, folder: str | Path | None = None) -> Path:
    """Write `payload` to benchmarks/results/<device>/<date>[-<name>].json, whole or not at all; return the path.

    `payload["metadata"]` is added when missing. `folder` replaces benchmarks/results/<device>.
    """
    payload = {"metadata": metadata(), **payload}
    taken = payload["metadata"]
    folder = RESULTS / taken["device"] if folder is None else Path(folder)
    stamp = taken["date"].replace(":", "").removesuffix("Z").replace("T", "-")
    path = folder / (f"{stamp}-{name}.json" if name else f"{stamp}.json")
    write_json(path, payload)
    return path


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: str | torch.device) -> str:
    """What the vendor calls the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_slug(device: str | torch.device | None = None) -> str:
    """The device as a folder's name: cpu-amd-epyc-2c, nvidia-h100-80gb-hbm3."""
    device = default_device() if device is None else torch.device(device)
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*|\bcpu\b", " ", device_name(device).lower())).strip("-")
    return slug if device.type == "cuda" else f"cpu-{slug}-{_cores()}c"


def _cuda_sample(fn: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if calls <= 4:
        torch.cuda._sleep(HIDE_LAUNCH_CYCLES)
    start.record()
    for _ in range(calls):
        fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _cpu_sample(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def _calls_per_sample(fn: Callable[[], object], sample: Callable, least: float) -> int:
    fn()
    seconds = sample(fn, 1)
    if seconds < 200 * least:  # a disturbed probe would leave too few calls in a sample
        seconds = min([seconds, *(sample(fn, 1) for _ in range(7))])
    return max(1, min(1000, round(least / max(seconds, 1e-9))))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_facts() -> dict:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "autograd_node": "Python" if NODE is None else "C++",
    }


def _cuda_facts(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        **_nvidia_smi(device),
    }


def _nvidia_smi(device: torch.device) -> dict:
    """Driver, clocks, power limit and temperature as nvidia-smi reads them; empty where it cannot."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", str(index)]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(packages.PackageNotFoundError):
            found[name] = packages.version(name)
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
