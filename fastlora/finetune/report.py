"""What a run leaves for people to read: `report.json` and `history.csv`."""

from __future__ import annotations

import csv
import io
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fastlora.errors import UserError, shown
from fastlora.finetune.files import REPORT, read_json, write_bytes, write_json
from fastlora.linear import EagerLoRALinear, FusedLoRALinear

LAYERS = {"fused": FusedLoRALinear, "eager": EagerLoRALinear}
FIELDS = ("task", "impl", "path", "device", "dataset", "batches", "epochs", "trainable_parameters", "total_parameters",
          "adapter_parameters", "adapter_bytes", "full_layer_parameters", "train_seconds", "tokens_per_second",
          "peak_memory_bytes", "valid_accuracy", "test_accuracy", "seed", "versions")


def versions() -> dict[str, str]:
    """Versions of fastlora and what it runs on."""
    import fastlora

    found = {"fastlora": fastlora.__version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the device's allocator held; on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameters(model: nn.Module) -> dict[str, int]:
    """The report's counts: what trains, everything, the adapter's, and its layers' weights."""
    layers = [module for module in model.modules() if isinstance(module, FusedLoRALinear)]
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_parameters": sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers),
        "full_layer_parameters": sum(layer.weight.numel() for layer in layers),
    }


def saving(counts: Mapping[str, int], size: int) -> str:
    """One line: the adapter's size beside its layers'. `size`: bytes of the adapter's file."""
    adapter, full = counts["adapter_parameters"], counts["full_layer_parameters"]
    times = f"{full / adapter:.0f}x fewer" if adapter <= full else f"{adapter / full:.1f}x more, --rank is too high"
    return f"adapter: {adapter:,} numbers against {full:,} of its layers: {times} ({size:,} bytes)"


def write_report(folder: Path, report: Mapping) -> None:
    """Write `<folder>/report.json`. Its being there says that the run is finished: write it last."""
    missing = [name for name in FIELDS if name not in report]
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}")
    write_json(folder / REPORT, dict(report))


def read_report(folder: Path) -> dict:
    """The report of a finished run; UserError when `folder` holds none or a damaged one."""
    try:
        os.lstat(folder / REPORT)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: holds no finished run (no {REPORT})") from None
    except OSError:  # a name too long, say: what reads it tells
        pass
    report = read_json(folder / REPORT)
    if not isinstance(report, dict) or not isinstance(report.get("task"), str):
        raise UserError(f"{folder / REPORT}: damaged, it names no task")
    return report


def count_in(folder: Path, report: Mapping, name: str, most: int) -> int:
    """The whole number `name`, from 1 to `most`, of the report in `folder`; UserError when it is none."""
    value = report.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{folder / REPORT}: damaged, its {name} is {shown(value)}, not a number from 1 to {most}")
    return value


def write_history(folder: Path, history: Sequence[Mapping]) -> None:
    """Write the trainer's rows to `<folder>/history.csv`; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_bytes(folder / "history.csv", text.getvalue().encode())
