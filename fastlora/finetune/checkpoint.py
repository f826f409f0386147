"""Checkpoints: tensors by name and a dict of JSON values in one safetensors file, whole or not there; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.errors import UserError, shown
from fastlora.files import open_regular, write_bytes

STATE = "fastlora-state"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], **state) -> None:
    """Write `tensors`, and `state` as JSON in the file's metadata, to `path`, whole or not at all."""
    # clones, because safetensors refuses memory that is shared
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(tensors, {STATE: json.dumps(state)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) as `write_checkpoint` was given them; UserError when the file is missing or damaged."""
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get(STATE, "{}"))  # another's file has none
            return {name: file.get_tensor(name).clone() for name in file.keys()}, state  # noqa: SIM118 - no mapping
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged ({shown(str(error))}); delete it to start again") from None


def fill(model: nn.Module, path: Path, tensors: Mapping[str, Tensor], names: set[str] | None = None) -> None:
    """Load `tensors` of the file `path` into `model`: exactly those of its state, or of the `names` out of it.

    UserError, and nothing is changed, for one that is missing, not finite, of another shape or dtype, or one too many.
    """
    state = {name: held for name, held in model.state_dict().items() if names is None or name in names}
    for name in sorted(state.keys() ^ tensors.keys()):
        how = "is missing" if name in state else "has no place in this one"
        raise UserError(f"{path}: of another model: {shown(name)} {how}")
    for name, held in state.items():
        if (tensors[name].shape, tensors[name].dtype) != (held.shape, held.dtype):
            needed = f"{tuple(held.shape)} and {held.dtype}"
            raise UserError(f"{path}: of another model: {name} is not of this model's shape {needed}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    model.load_state_dict(tensors, strict=False)
