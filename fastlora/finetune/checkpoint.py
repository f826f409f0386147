"""Checkpoints: a dict, nested, of tensors and plain values in one safetensors file, whole or not there; no pickle.

The file's metadata holds the dict as JSON, with names in the place of tensors, and a sha256 over all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fastlora.errors import UserError, shown
from fastlora.files import read_regular, write_bytes

FORMAT = "fastlora-checkpoint-1"
MOST = 8 << 30  # bytes of a file


def write_checkpoint(path: Path, content: Mapping) -> None:
    """Write `content`, dicts and lists of tensors and JSON values, to `path`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_apart(content, "", tensors))
    header = {"state": text, "digest": _digest(tensors, text)}
    write_bytes(path, save(tensors, {FORMAT: json.dumps(header)}))


def read_checkpoint(path: Path) -> dict:
    """What `write_checkpoint` wrote, keys as texts, and each tensor by its name, too; UserError when damaged."""
    try:
        raw = read_regular(path, MOST)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    try:
        tensors = load(raw)
        metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}
        if FORMAT not in metadata:
            raise UserError(f"{path}: not a checkpoint of this version of fastlora ({FORMAT})")
        header = json.loads(metadata[FORMAT])
        if header["digest"] != _digest(tensors, header["state"]):
            raise ValueError("its content does not match its checksum")
        return tensors | _together(json.loads(header["state"]), tensors)
    except UserError:
        raise
    except Exception as error:  # safetensors' own class, and what JSON of another form leads to
        raise UserError(f"{path}: damaged ({shown(str(error))}); delete it to start again") from None


def fill(model: nn.Module, path: Path, tensors: dict, names: set[str] | None = None) -> None:
    """Load `tensors` of the file `path` into `model`: exactly those of its state, or of the `names` out of it.

    Raises UserError, and leaves the model as it was, when one is missing, has no place there, is of another shape or
    dtype, or holds a number that is not finite.
    """
    state = {name: held for name, held in model.state_dict().items() if names is None or name in names}
    for name in sorted(state.keys() ^ tensors.keys()):
        raise UserError(f"{path}: {shown(name)} {'is missing' if name in state else 'has no place in this model'}")
    for name, held in state.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (held.shape, held.dtype):
            raise UserError(f"{path}: {name} is not of this model's shape {tuple(held.shape)} and {held.dtype}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    model.load_state_dict(tensors, strict=False)


def _apart(value, name: str, tensors: dict[str, Tensor]):
    """`value` with its tensors moved into `tensors`, a dict with one key in the place of each."""
    if isinstance(value, Tensor):
        tensors[name[1:]] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        return {"tensor": name[1:]}
    if isinstance(value, Mapping):
        return {str(key): _apart(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_apart(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _together(value, tensors: dict[str, Tensor]):
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _together(item, tensors) for key, item in value.items()}
    return [_together(item, tensors) for item in value] if isinstance(value, list) else value


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
