"""Checkpoints: one safetensors file, tensors and a JSON header, whole or not there; no pickle.

The header holds, under one key so that the same content gives the same bytes, `state`: everything that is not a
tensor, and `digest`: the sha256 over state and tensors, so that a damaged file is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import UserError, shown
from fastlora.finetune.files import write_bytes
from fastlora.regular_files import check_regular

FORMAT = "fastlora-checkpoint-1"
_KEPT = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}  # per parameter


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
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # safetensors' own error class, ValueError on a hostile header
        raise UserError(f"{path}: damaged, not a safetensors file ({shown(str(error))})") from None
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


def fill(model: nn.Module, path: Path, tensors: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
    """Load `tensors` of the file `path` into `model`: exactly those of its state, or of the `names` out of it.

    Raises UserError, and leaves the model as it was, when one is missing, has no place there, is of another shape or
    dtype, or holds a number that is not finite.
    """
    state = model.state_dict()
    names = state.keys() if names is None else set(names)
    for name in sorted(names ^ tensors.keys()):
        raise UserError(f"{path}: {shown(name)} {'is missing' if name in names else 'has no place in this model'}")
    for name, tensor in tensors.items():
        for got, want in ((tuple(tensor.shape), tuple(state[name].shape)), (tensor.dtype, state[name].dtype)):
            if got != want:
                raise UserError(f"{path}: {name} is {got}, this model needs {want}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    model.load_state_dict(state | tensors)


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

    Raises UserError when the checkpoint at `path` is of another model or optimiser, or not what `pack` takes.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    entries = _check(path, model, optimiser, scheduler, device, tensors, state)
    try:  # with generators of no consequence: only taking a state tells whether it is one
        for where in {"cpu", device.type}:
            torch.Generator(device if where == "cuda" else where).set_state(tensors[f"generator.{where}"])
    except RuntimeError:
        raise UserError(f"{path}: damaged, its generator is in no state that there is") from None
    torch.set_rng_state(tensors["generator.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)
    # What the file cannot hold (a tensor learning rate) stays as the optimiser was built.
    groups = [now | {k: v for k, v in then.items() if not isinstance(now.get(k), Tensor)}
              for now, then in zip(optimiser.state_dict()["param_groups"], state["groups"], strict=True)]
    optimiser.load_state_dict({"state": entries, "param_groups": groups})
    for group, then in zip(optimiser.param_groups, state["groups"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(then["lr"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def _check(path: Path, model: nn.Module, optimiser, scheduler, device, tensors, state) -> dict[int, dict[str, Any]]:
    """The optimiser's state per parameter, out of a checkpoint that is like one which `pack` would make now."""
    expected, now = pack(model, optimiser, scheduler, device)
    groups = state.get("groups")
    for kind, what in (("model.", "model (its trained parameters differ)"), ("generator.", "device")):
        wanted, found = ({name: (tuple(t.shape), t.dtype) for name, t in some.items() if name.startswith(kind)}
                         for some in (expected, tensors))
        if found != wanted:
            raise UserError(f"{path}: a checkpoint of another {what}")
    for name, tensor in tensors.items():
        if name.startswith("model.") and not tensor.isfinite().all():
            raise UserError(f"{path}: {shown(name)} is not finite: the training diverged; delete it to start again")
    if not alike(now["groups"], groups) or [g["params"] for g in now["groups"]] != [g["params"] for g in groups]:
        raise UserError(f"{path}: a checkpoint of another optimiser")
    if not alike(now["scheduler"], state.get("scheduler")):
        raise UserError(f"{path}: a checkpoint of another schedule of the learning rate")
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    entries = _entries(tensors, state.get("optimiser"))
    kept = _KEPT.get(type(optimiser))
    if entries is None or not all(
        index < len(trained) and kept in (None, values.keys()) and all(
            _fits(value, trained[index]) for value in values.values())
        for index, values in entries.items()
    ):  # fmt: skip
        raise UserError(f"{path}: damaged, the optimiser's state in it is not one of these parameters")
    return entries


def _entries(tensors: dict[str, Tensor], numbers: object) -> dict[int, dict[str, Any]] | None:
    """The optimiser's state by the parameters' numbers; None when it is nothing of the kind."""
    found: dict[int, dict[str, Any]] = {}
    for index, values in numbers.items() if isinstance(numbers, dict) else ():
        if not (index.isascii() and index.isdigit() and len(index) < 10 and isinstance(values, dict)):
            return None
        found[int(index)] = dict(values)
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = [*name.split(".", 2), ""][:3]
            if index not in map(str, found):
                return None
            found[int(index)][key] = tensor
    return found if isinstance(numbers, dict) else None


def _fits(value: object, parameter: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.shape in ((), parameter.shape)
    return value is None or alike(0, value)


def alike(one: object, other: object) -> bool:
    """Whether two JSON values are of one form: the same keys and lengths, numbers (finite) where there are numbers."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return (isinstance(other, list | tuple) and len(one) == len(other)
                and all(alike(a, b) for a, b in zip(one, other, strict=True)))
    if type(one) in (int, float):
        return type(other) in (int, float) and abs(other) < 2**63 and math.isfinite(other)
    return type(one) is type(other)


def _plain(value):
    return value.item() if isinstance(value, Tensor) else value


def _is_json(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
