"""A run's folder: what it was started with, and what it leaves: `report.json`, `history.csv`, `curves.png`."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import fastlora
from fastlora.errors import UserError, shown
from fastlora.files import FULL, clear_leftovers, read_json, write_bytes, write_json
from fastlora.linear import EagerLoRALinear, FusedLoRALinear

LAYERS = {"fused": FusedLoRALinear, "eager": EagerLoRALinear}
SETTINGS = "run.json"  # written first: its presence marks a folder as a run's
REPORT = "report.json"  # written last: its presence marks the run as finished
CHECKPOINT, MODEL, VOCABULARY = "checkpoint.safetensors", "model.safetensors", "vocabulary.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RUN_FILES = (SETTINGS, REPORT, CHECKPOINT, "checkpoints", "history.csv", "curves.png", *ADAPTER, MODEL, VOCABULARY,
             "gpt2")  # fmt: skip
LOCK = ".fastlora.lock"
FIELDS = ("task", "impl", "path", "device", "dataset", "batches", "epochs", "trainable_parameters", "total_parameters",
          "adapter_parameters", "adapter_bytes", "full_layer_parameters", "train_seconds", "tokens_per_second",
          "peak_memory_bytes", "valid_accuracy", "test_accuracy", "seed", "versions")  # fmt: skip


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`; while another process does, wait, or raise UserError(busy)."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0 if busy else -1):
            yield
    except Timeout:
        raise UserError(busy) from None


@contextlib.contextmanager
def run_folder(path: Path, settings: Mapping, resume: bool) -> Iterator[bool]:
    """Hold `path` as the output folder of a run; yields True when it holds an unfinished run to go on with.

    Args:
        path: the folder, made if needed.
        settings: what decides the run's result (JSON values); kept in run.json, so that a run is resumed only with
            the settings it was started with.
        resume: go on with the run that the folder holds (an empty folder starts a new one).

    Raises UserError when the folder holds a run and `resume` is false, the run was started with other settings,
    another process holds the folder, or it cannot be written to.
    """
    with contextlib.ExitStack() as held:
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path / LOCK, f"{path}: another run is writing to this folder"))
        except OSError as error:
            if error.errno in FULL:
                raise
            raise UserError(f"{path}: cannot be used as output folder ({error.strerror})") from None
        begun = _begun(path, settings, resume)
        if resume and not begun:
            print(f"{path}: holds no run to go on with; a new one starts", flush=True)
        clear_leftovers(path)
        if not begun:
            write_json(path / SETTINGS, dict(settings))
        try:
            yield begun
        except Exception:
            if not any(os.path.lexists(path / name) for name in RUN_FILES if name != SETTINGS):
                (path / SETTINGS).unlink(missing_ok=True)  # nothing was made: the folder is free for another try
            raise


def _begun(path: Path, settings: Mapping, resume: bool) -> bool:
    present = [name for name in RUN_FILES if os.path.lexists(path / name)]
    if not present:
        return False
    if not resume:
        state = "a finished run" if {SETTINGS, REPORT} <= {*present} else f"a run's files ({present[0]})"
        hint = ", or go on with it by --resume" if SETTINGS in present and REPORT not in present else ""
        raise UserError(f"{path}: holds {state} already; choose another --output{hint}")
    if SETTINGS not in present:
        raise UserError(f"{path}: holds {present[0]} but no {SETTINGS}, so there is no run to resume")
    before, now = read_json(path / SETTINGS), json.loads(json.dumps(dict(settings)))
    if not isinstance(before, dict):
        raise UserError(f"{path / SETTINGS}: damaged, not a run's settings")
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            raise UserError(f"{path}: the run was started with {shown(key)[1:-1]} = {shown(before.get(key))}, not "
                            f"{shown(now.get(key))}; --resume needs the same settings")  # fmt: skip
    return True


def finished(path: Path) -> bool:
    """Whether the run in the folder `path` is finished; says so."""
    if (path / REPORT).exists():
        print(f"{path}: the run is finished already")
    return (path / REPORT).exists()


def fingerprint(settings: Mapping) -> str:
    """A digest of a run's settings (JSON values): what they decided is told by it from what others did."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()


def leave(folder: Path, history: Sequence[Mapping], title: str, device: torch.device, report: Mapping) -> None:
    """Write history.csv, curves.png and, last, since it says that the run is finished, report.json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_bytes(folder / "history.csv", text.getvalue().encode())
    plot_history(folder / "curves.png", history, title)
    report = {
        **report,
        "device": f"cpu ({torch.get_num_threads()} threads)",
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "versions": versions(),
    }
    if device.type == "cuda":
        report["device"] = torch.cuda.get_device_name(device)
        report["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    elif sys.platform != "darwin":
        report["peak_memory_bytes"] *= 1024
    if absent := [name for name in FIELDS if name not in report]:
        raise ValueError(f"the report lacks {', '.join(absent)}")
    write_json(folder / REPORT, report)
    adapter, full = report["adapter_parameters"], report["full_layer_parameters"]
    times = f"{full / adapter:.0f}x fewer" if adapter <= full else f"{adapter / full:.1f}x more, --rank is too high"
    print(f"adapter: {adapter:,} numbers against {full:,} of its layers: {times} ({report['adapter_bytes']:,} bytes)")


def plot_history(path: Path, history: Sequence[Mapping], title: str) -> None:
    """Draw the rows of a history: loss on the left, accuracy on the right, training and validation."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in history]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "valid"):
            values = [row[f"{part}_{quantity}"] for row in history]
            axes.plot(epochs, values, marker="o" if len(epochs) < 40 else None, markersize=3, label=part)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())


def read_report(folder: Path) -> dict:
    """The report of a finished run; UserError when `folder` holds none or a damaged one."""
    try:
        os.lstat(folder / REPORT)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: holds no finished run (no {REPORT})") from None
    report = read_json(folder / REPORT)
    if not isinstance(report, dict) or not isinstance(report.get("task"), str):
        raise UserError(f"{folder / REPORT}: damaged, it names no task")
    return report


def number_in(folder: Path, report: Mapping, name: str, most: int) -> int:
    """The whole number `name`, from 1 to `most`, of the report in `folder`; UserError when it is none."""
    value = report.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{folder / REPORT}: damaged, its {name} is {shown(value)}, not a number from 1 to {most}")
    return value


def counts(model: nn.Module) -> dict[str, int]:
    """The report's counts of parameters: what trains, everything, the adapter's, and its layers' weights."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]  # ours, and PEFT's
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name),
        "full_layer_parameters": sum(layer.weight.numel() for layer in layers),
    }


def path_of(impl: str, layer: FusedLoRALinear, *lead: int) -> str:
    """The path that a LoRA layer takes for an input of shape (*lead, in_features)."""
    if impl == "eager":
        return "eager"
    return fastlora.explain(layer, torch.zeros(*lead, layer.in_features).to(layer.weight)).path


def versions() -> dict[str, str]:
    """Versions of fastlora and what it runs on."""
    found = {"fastlora": fastlora.__version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
