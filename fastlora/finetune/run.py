"""A run's folder: what it was started with, and what it leaves: `report.json`, `history.csv`, `curves.png`."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import fastlora
from fastlora.errors import UserError, shown
from fastlora.files import atomic_write, clear_leftovers, read_json, write_bytes, write_json
from fastlora.finetune import parallel

SETTINGS = "run.json"  # written first: its presence marks a folder as a run's
REPORT = "report.json"  # written last: its presence marks the run as finished
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"
RUN_FILES = (SETTINGS, REPORT, CHECKPOINT, "checkpoints", "history.csv", "curves.png", "adapter_config.json",
             "adapter_model.safetensors", MODEL, "gpt2", "adapters")  # fmt: skip
LOCK = ".fastlora.lock"
REFUSED, UNFINISHED, FINISHED = range(3)
MOST_NAMED = 12  # runs in a picture's legend, which leaves no room for more
Predictor = Callable[[list[str]], list[tuple[str, float]]]  # texts to (label, probability) each


def settings_of(args: argparse.Namespace, **more) -> dict:
    """What decides a run's result, as JSON values: the flags, completed by the recipe, and `more`."""
    flags = {key: value for key, value in vars(args).items() if key not in ("command", "output", "resume", "no_graph")}
    return json.loads(json.dumps({"task": args.program, **flags, **more}, default=str))


@contextlib.contextmanager
def run_folder(path: Path, settings: Mapping, resume: bool, device="cpu") -> Iterator[bool]:
    """Hold `path` as the output folder of a run; yields False when that run is finished already.

    `settings`, JSON values that decide the run's result, are kept in run.json: with `resume`, the run that the folder
    holds goes on only with those that it was started with. An empty folder starts a new one. Of processes that train
    together the first holds it, and all get its answer.

    UserError when the folder holds a run and `resume` is false, the run was started with other settings, another
    process holds the folder, or it cannot be written to.
    """
    lock, found = FileLock(path / LOCK), REFUSED
    try:
        try:
            if parallel.first():
                found = _claim(path, lock, settings, resume)
        except Exception:
            with contextlib.suppress(Exception):  # others that are gone need no answer
                parallel.add(torch.tensor(REFUSED, device=device))
            raise
        found = int(parallel.add(torch.tensor(found, device=device)))  # the others' is 0
        if found == REFUSED:
            sys.exit(2)  # the first process says why
        yield found == UNFINISHED
    except Exception:
        if parallel.first() and found != REFUSED and not any((path / name).exists() for name in RUN_FILES[1:]):
            (path / SETTINGS).unlink(missing_ok=True)  # nothing was made: the folder is free for another try
        raise
    finally:
        lock.release()


def _claim(path: Path, lock: FileLock, settings: Mapping, resume: bool) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{path}: another run is writing to this folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be used as output folder ({error.strerror})") from None
    present = [name for name in RUN_FILES if (path / name).exists()]
    if present and not resume:
        state = "a finished run" if REPORT in present else f"a run's files ({present[0]})"
        hint = ", or go on with it by --resume" if SETTINGS in present and REPORT not in present else ""
        raise UserError(f"{path}: holds {state} already; choose another --output{hint}")
    if present and SETTINGS not in present:
        raise UserError(f"{path}: holds {present[0]} but no {SETTINGS}, so there is no run to resume")
    if resume and not present:
        print(f"{path}: holds no run to go on with; a new one starts", flush=True)
    clear_leftovers(path)
    before = read_json(path / SETTINGS) if SETTINGS in present else dict(settings)
    for key, value in settings.items():
        if before.setdefault(key, value) != value:
            raise UserError(f"{path}: the run was started with {key} = {shown(before[key])}, not {shown(value)}; "
                            "--resume needs the same settings and data")  # fmt: skip
    write_json(path / SETTINGS, before)
    if REPORT not in present:
        return UNFINISHED
    print(f"{path}: the run is finished already")
    return FINISHED


def leave(folder: Path, rows: Sequence[Mapping], title: str, device: torch.device, report: Mapping) -> None:
    """Write history.csv, curves.png and, last, since it says that the run is finished, report.json.

    `rows` of history, one an evaluation; those of a sweep have the name of their run under "run".
    """
    import pandas as pd

    history = pd.DataFrame(rows)
    write_bytes(folder / "history.csv", history.to_csv(index=False).encode())
    plot_history(folder / "curves.png", history, title)
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        name, peak = f"cpu ({torch.get_num_threads()} threads)", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    size = (folder / "adapter_model.safetensors").stat().st_size
    report = {**report, "device": name, "adapter_bytes": size, "peak_memory_bytes": peak, "versions": versions()}
    write_json(folder / REPORT, report)
    adapter, full = report["adapter_parameters"], report["full_layer_parameters"]
    times = f"{full / adapter:.0f}x fewer" if adapter <= full else f"{adapter / full:.1f}x more, --rank is too high"
    print(f"adapter: {adapter:,} numbers against {full:,} of its layers: {times} ({size:,} bytes)")
    print(f"accuracy: valid {report['valid_accuracy']:.2%}, test {report['test_accuracy']:.2%}; trained "
          f"{report['train_seconds']:.1f} s; everything is in {folder}")  # fmt: skip
    if report["dataset"] == "sample":
        print("the texts were made up out of templates: the figures say nothing about real ones")


def plot_history(path: Path, history, title: str) -> None:
    """Draw loss on the left, accuracy on the right: training and validation of one run, or validation of several."""
    from matplotlib.figure import Figure  # no pyplot, and so none of pandas' plots: no display, no global state

    figure, several = Figure(figsize=(9, 3.5), layout="constrained"), "run" in history
    figure.suptitle(title)
    runs = history.groupby("run", sort=False) if several else [(None, history)]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, rows in runs:
            for part in ("valid",) if several else ("train", "valid"):
                axes.plot(rows["epoch"], rows[f"{part}_{quantity}"], ".-", label=name or part)
        axes.set(xlabel="epoch", ylabel=f"validation {quantity}" if several else quantity)
        axes.grid(alpha=0.3)
        if len(runs) <= MOST_NAMED:
            axes.legend(fontsize="x-small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def read_report(folder: Path) -> dict:
    """The report of a finished run; UserError when `folder` holds none."""
    if not (folder / REPORT).exists():
        why = "holds no run" if folder.is_dir() else "no such folder"
        if (folder / SETTINGS).exists():
            why = "holds an unfinished run; what started it goes on with it by --resume"
        raise UserError(f"{folder}: {why} (no {REPORT})")
    report = read_json(folder / REPORT)
    if not isinstance(report, dict) or "task" not in report:
        raise UserError(f"{folder / REPORT}: damaged, it names no task")
    return report


def predictor(labels: Sequence[str], logits: Callable[[list[str]], Tensor]) -> Predictor:
    """A function that labels texts, (label, probability) each, by `logits(texts)`, (texts, labels)."""

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[tuple[str, float]]:
        chances, classes = logits(texts).float().softmax(-1).max(-1)
        return [(labels[c], p) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    return predict


def counts(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """The report's counts: what trains, all parameters, the adapter's, its layers' weights; of several, `adapter`'s."""
    named = list(model.named_parameters())
    own = [(name, p) for name, p in named if not (p.requires_grad and adapter and f".{adapter}." not in name)]
    layers = {module.weight for module in model.modules() if hasattr(module, "lora_A")}  # ours, and PEFT's
    return {
        "trainable_parameters": sum(p.numel() for _, p in own if p.requires_grad),
        "total_parameters": sum(p.numel() for _, p in own),
        "adapter_parameters": sum(p.numel() for name, p in own if "lora_" in name),
        "full_layer_parameters": sum(weight.numel() for weight in layers),
    }


def versions() -> dict[str, str]:
    """Versions of fastlora and what it runs on."""
    found = {"fastlora": fastlora.__version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
