"""The frozen base of `train spam`: GPT-2's weights from a file, or random ones, which are kept with the run."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from fastlora import env
from fastlora.errors import UserError, shown
from fastlora.finetune import gpt2_weights
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.files import REPORT
from fastlora.finetune.gpt2 import CONFIGS, GPT2

BASE = "model.safetensors"  # in the run's folder: those frozen weights that came from no file
RANDOM = "random"


def named_weights(named: str | None, size: str) -> Path | None:
    """The file of the base weights, or None for random ones."""
    if named == RANDOM or (named is None and size == "nano"):
        return None
    return gpt2_weights.find(None if named is None else env.expanded(named)).resolve()


def make_base(size: str, weights: Path | None, seed: int) -> GPT2:
    """The model with its frozen weights from the file, or random ones; its head is random in any case."""
    torch.manual_seed(seed)
    model = GPT2(CONFIGS[size])
    if weights is not None:
        gpt2_weights.load(model, weights)
    return model


def keep_base(model: GPT2, weights: Path | None, run: Path, origin: dict) -> None:
    """Write what came from no file into the run's folder, with the digests of its `data` and settings (`run`)."""
    write_checkpoint(run / BASE, _of_no_file(model, weights), origin)


def kept_base(model: GPT2, weights: Path | None, run: Path, origin: dict | None = None) -> None:
    """Read into `model` what `keep_base` wrote; UserError when it is damaged or, with `origin`, another run's."""
    path = run / BASE
    tensors, state = read_checkpoint(path)
    if origin is not None and state.get("data") != origin["data"]:
        raise UserError(f"{run}: the data is not what the run was started with")
    if origin is not None and state.get("run") != origin["run"]:
        raise UserError(f"{path}: not of this run, or of another version of fastlora")
    fill(model, path, tensors, _of_no_file(model, weights))


def weights_of(run: Path, report: dict) -> Path | None:
    """The file of base weights that a finished run names, None for random ones; UserError when it is another by now."""
    weights = report.get("weights")
    if weights == RANDOM:
        return None
    try:
        os.fsencode(weights)
    except (TypeError, ValueError):
        weights = None
    if not weights or any(ord(letter) < 32 or ord(letter) == 127 for letter in weights):
        raise UserError(f"{run / REPORT}: damaged, its weights is {shown(report.get('weights'))}, not a path")
    # earlier versions left no digest to compare with
    if "weights_sha256" in report and gpt2_weights.sha256(Path(weights)) != report["weights_sha256"]:
        raise UserError(f"{weights}: not the base weights that {run} was trained on")
    return Path(weights)


def _of_no_file(model: GPT2, weights: Path | None) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if weights is None or name.startswith("head.")}
