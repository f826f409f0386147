"""Checkpoints: one safetensors file, tensors and a JSON header, whole or not there; no pickle.

The header holds, under one key so that the same content gives the same bytes, `state`: everything that is not a
tensor, and `digest`: the sha256 over state and tensors, so that a damaged file is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.finetune.files import write_bytes

FORMAT = "fastlora-checkpoint-1"


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write `tensors` and `state` (JSON values) to `path`, whole or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    header = {"state": text, "digest": _digest(tensors, text)}
    write_bytes(path, save(tensors, metadata={FORMAT: json.dumps(header)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint; UserError when it is missing or damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # safetensors' own error class, OSError, ValueError on a hostile header
        raise UserError(f"{path}: damaged, not a safetensors file ({str(error).splitlines()[0][:80]})") from None
    if FORMAT not in metadata:
        raise UserError(f"{path}: not a checkpoint of this version of fastlora ({FORMAT})")
    try:
        header = json.loads(metadata[FORMAT])
        whole = header["digest"] == _digest(tensors, header["state"])
        state = json.loads(header["state"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole or not isinstance(state, dict):
        raise UserError(f"{path}: damaged, its content does not match its checksum; delete it to start again")
    return tensors, state


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pack(model: nn.Module, optimiser, scheduler, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a training in progress: trained parameters, optimiser, scheduler, torch's generators."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    tensors["generator.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(device)
    packed = optimiser.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        numbers[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{key}"] = value
            else:
                numbers[str(index)][key] = value
    groups = [{key: _plain(value) for key, value in group.items()} for group in packed["param_groups"]]
    schedule = None if scheduler is None else {k: v for k, v in scheduler.state_dict().items() if _is_json(v)}
    return tensors, {"optimiser": numbers, "groups": groups, "scheduler": schedule}


def unpack(path: Path, model: nn.Module, optimiser, scheduler, device: torch.device, tensors, state) -> None:
    """Put what `pack` took back in its place. Everything is checked before anything is changed.

    Raises UserError when the checkpoint at `path` is of another model or optimiser.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    if {name: tuple(t.shape) for name, t in saved.items()} != shapes:
        raise UserError(f"{path}: a checkpoint of another model (its trained parameters differ)")
    current = optimiser.state_dict()["param_groups"]
    if [g["params"] for g in state["groups"]] != [g["params"] for g in current]:
        raise UserError(f"{path}: a checkpoint of another optimiser")
    entries: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in state["optimiser"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            entries[int(index)][key] = tensor
    # What the file cannot hold (a tensor learning rate) stays as the optimiser was built.
    groups = [now | {k: v for k, v in then.items() if not isinstance(now.get(k), Tensor)}
              for now, then in zip(current, state["groups"], strict=True)]
    optimiser.load_state_dict({"state": entries, "param_groups": groups})
    for group, then in zip(optimiser.param_groups, state["groups"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(then["lr"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    torch.set_rng_state(tensors["generator.cpu"])
    if device.type == "cuda" and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)


def _plain(value):
    return value.item() if isinstance(value, Tensor) else value


def _is_json(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
