"""An adapter's two files, `adapter_config.json` and `adapter_model.safetensors`: read with suspicion, written whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import UserError, WorkError, shown
from fastlora.regular_files import OURS, TEMPORARY, open_regular

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class AdapterError(UserError, ValueError):
    """An adapter's files are missing, damaged or unsupported, or do not fit the model. One line."""


def opened(path: Path) -> tuple[BinaryIO, int]:
    """The file, open for reading, and its size in bytes; AdapterError unless it is a regular file that can be read."""
    try:
        file = open_regular(path)
        return file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: not an adapter, or one whose saving was interrupted") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from None


def read_config(directory: str | os.PathLike) -> dict:
    """The JSON object in a directory's adapter_config.json; AdapterError for anything else or a name given twice."""
    path = Path(directory) / CONFIG_NAME

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is not a number of JSON")

    file, size = opened(path)
    with file:
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} has {size} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
        text = file.read(MAX_CONFIG_BYTES)
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: no valid JSON ({shown(str(error))})") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path} is damaged: its JSON is no object")
    return found


class TensorFile:
    """A directory's adapter_model.safetensors, its header checked by the safetensors library, its tensors not yet read.

    `entries` maps each name to (dtype, shape). Memory until `read` is bounded by MAX_HEADER_BYTES. A context manager.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.path = Path(directory) / WEIGHTS_NAME
        file, size = opened(self.path)
        with file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise AdapterError(f"{self.path} is damaged: shorter than its header says")
        if length > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{self.path} is damaged: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
            )
        try:
            self._file = safe_open(self.path, framework="pt")
            self._metadata = self._file.metadata() or {}
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - not a mapping
        except MemoryError:
            raise AdapterError(f"{self.path} has {size} bytes, more than there is memory for") from None
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, entry in slices.items():
            if entry.get_dtype() not in DTYPES:
                raise AdapterError(f"{self.path}: {shown(name)} has the unsupported dtype {entry.get_dtype()}")
            self.entries[name] = DTYPES[entry.get_dtype()], tuple(entry.get_shape())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception) -> None:
        self._file.__exit__(*exception)

    def _damaged(self, error: Exception) -> AdapterError:
        return AdapterError(f"{self.path} is damaged: {shown(str(error))}")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        try:
            return self._file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def check_sum(self) -> None:
        """Compare the tensors with the SHA-256 that `write_adapter` leaves in the metadata; PEFT leaves none."""
        wanted = self._metadata.get("sha256")
        if wanted is not None and wanted != _sha256(self.read(name) for name in sorted(self.entries)):
            raise AdapterError(f"{self.path} is damaged: its tensors are not the ones that were written (SHA-256)")


def write_adapter(directory: str | os.PathLike, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all; the configuration comes last and marks the adapter as complete.

    Both are written in full under other names first. Only then is an older adapter there replaced, its configuration
    removed first: an interruption at any moment leaves the old adapter, the new one, or one that is refused as
    incomplete, never a mixture of the two.

    Raises:
        AdapterError: `directory` is a file, or holds an adapter_config.json that is not a LoRA adapter's.
        WorkError: writing failed (a full disk, say); an older adapter there is untouched.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory")
    if os.path.lexists(directory / CONFIG_NAME) and read_config(directory).get("peft_type") != "LORA":
        raise AdapterError(f"{directory / CONFIG_NAME} is there already and not a LoRA adapter's: nothing written")
    # Copies, because the library refuses tensors that share memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    summed = _sha256(tensors[name] for name in sorted(tensors))
    weights = _in_order(save(tensors, {"format": "pt", "sha256": summed}))
    settings = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    suffix = f".{os.getpid()}.{os.urandom(4).hex()}{TEMPORARY}"
    new_config, new_weights = (directory / f"{OURS}{name}{suffix}" for name in (CONFIG_NAME, WEIGHTS_NAME))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            for path, content in ((new_weights, weights), (new_config, settings)):
                with open(path, "xb") as file:
                    file.write(content)
                    _flush(file)
            (directory / CONFIG_NAME).unlink(missing_ok=True)
            os.replace(new_weights, directory / WEIGHTS_NAME)
            os.replace(new_config, directory / CONFIG_NAME)
        finally:
            new_weights.unlink(missing_ok=True)
            new_config.unlink(missing_ok=True)
        _flush_directory(directory)
    except OSError as error:
        raise WorkError(f"the adapter could not be written to {directory}: {error.strerror or error}") from error


def _sha256(tensors: Iterable[Tensor]) -> str:
    summed = hashlib.sha256()
    for tensor in tensors:
        summed.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return summed.hexdigest()


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library leaves their order to chance."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
