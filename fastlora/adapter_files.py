"""An adapter's two files: `adapter_config.json` and `adapter_model.safetensors`, read with suspicion, written
whole.

The safetensors format: 8 bytes little-endian length, a JSON header of that length that gives each tensor's
    dtype, shape
and place, then the tensors' bytes without gaps. No pickle anywhere.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastlora.errors import UserError, WorkError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 32 << 20
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
CODES = {dtype: code for code, dtype in DTYPES.items()}


class AdapterError(UserError, ValueError):
    """An adapter's files are missing, damaged or unsupported, or do not fit the model. One line."""


def shown(name: object) -> str:
    """A name out of a stranger's file, fit to be shown: quoted, control characters escaped, of bounded length."""
    text = ascii(name)
    return text if len(text) <= 200 else text[:200] + "..."


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """The file, open for reading, and its size in bytes; AdapterError unless it is a regular file that can be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AdapterError(f"{path} is not a file")
        file = open(path, "rb")  # noqa: SIM115 - handed to the caller
        return file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: not an adapter, or one whose saving was interrupted") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from None


def parse_json(path: Path, text: bytes) -> dict:
    """`text` as one JSON object; AdapterError for anything else, a name given twice or a number that is not finite."""

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: no valid JSON ({shown(str(error))})") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path} is damaged: its JSON is no object")
    return found


def read_config(directory: str | os.PathLike) -> dict:
    """The raw contents of a directory's adapter_config.json."""
    path = Path(directory) / CONFIG_NAME
    file, size = open_regular(path)
    with file:
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} has {size} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
        return parse_json(path, file.read(MAX_CONFIG_BYTES))


class TensorFile:
    """A directory's adapter_model.safetensors, its header checked and its tensors not yet read.

    `entries` maps each name to (dtype, shape). Memory until `read` is bounded by MAX_HEADER_BYTES. A context
    manager.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.path = Path(directory) / WEIGHTS_NAME
        self._file, size = open_regular(self.path)
        try:
            self._read_header(size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def _damaged(self, why: str) -> AdapterError:
        return AdapterError(f"{self.path} is damaged: {why}")

    def _read_header(self, size: int) -> None:
        length = int.from_bytes(self._exactly(8), "little") if size >= 8 else None
        if length is None or length > size - 8:
            raise self._damaged("shorter than its header says")
        if length > MAX_HEADER_BYTES:
            raise self._damaged(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        header = parse_json(self.path, self._exactly(length))
        metadata = header.pop("__metadata__", None)
        self._sha256 = metadata.get("sha256") if isinstance(metadata, dict) else None
        self._start = 8 + length
        self._places: dict[str, tuple[int, int]] = {}
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, entry in header.items():
            self._add_entry(name, entry)
        end = 0
        for name, (first, last) in sorted(self._places.items(), key=lambda item: item[1]):
            if first != end:
                raise self._damaged(f"the bytes of {shown(name)} overlap others or leave a gap")
            end = last
        if end != size - self._start:
            raise self._damaged(f"holds {size - self._start} bytes of tensors where its header says {end}")

    def _add_entry(self, name: str, entry: object) -> None:
        try:
            code, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
            first, last = place
            whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
        except (TypeError, KeyError, ValueError):
            raise self._damaged(f"the header's entry {shown(name)} is malformed") from None
        if not isinstance(code, str) or code not in DTYPES:
            raise AdapterError(f"{self.path}: {shown(name)} has the unsupported dtype {shown(code)}")
        if (
            not whole
            or not isinstance(shape, list)
            or len(shape) > 8
            or last - first != math.prod(shape) * DTYPES[code].itemsize
        ):
            raise self._damaged(f"the shape and the size of {shown(name)} disagree")
        self.entries[name] = DTYPES[code], tuple(shape)
        self._places[name] = first, last

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        if self._file.readinto(data) != count:
            raise self._damaged("it ends too early")
        return data

    def check_sum(self) -> None:
        """Compare the tensors' bytes with the SHA-256 that `write_adapter` leaves in the header; PEFT leaves none."""
        if self._sha256 is None:
            return
        found = hashlib.sha256()
        self._file.seek(self._start)
        while chunk := self._file.read(1 << 20):
            found.update(chunk)
        if found.hexdigest() != self._sha256:
            raise self._damaged("its tensors are not the ones that were written (SHA-256)")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        dtype, shape = self.entries[name]
        first, last = self._places[name]
        if first == last:
            return torch.empty(shape, dtype=dtype)
        try:
            self._file.seek(self._start + first)
            return torch.frombuffer(self._exactly(last - first), dtype=dtype).reshape(shape)
        except OSError as error:
            raise AdapterError(f"{self.path} cannot be read: {error.strerror or error}") from None


def write_adapter(directory: str | os.PathLike, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all; the configuration comes last and marks the adapter as
    complete.

    Both are written in full under other names first. Only then is an older adapter there replaced, its
    configuration removed first: an interruption at any moment leaves the old adapter, the new one, or one
    that is refused as incomplete, never a mixture of the two.

    Raises:
        AdapterError: `directory` is a file, or holds an adapter_config.json that is not a LoRA adapter's.
        WorkError: writing failed (a full disk, say); an older adapter there is untouched.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory")
    if os.path.lexists(directory / CONFIG_NAME) and read_config(directory).get("peft_type") != "LORA":
        raise AdapterError(f"{directory / CONFIG_NAME} is there already and not a LoRA adapter's: nothing written")
    suffix = f".{os.getpid()}.{os.urandom(4).hex()}.tmp"
    new_config, new_weights = directory / (CONFIG_NAME + suffix), directory / (WEIGHTS_NAME + suffix)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with open(new_weights, "xb") as file:
                _write_tensors(file, tensors)
                _flush(file)
            with open(new_config, "xb") as file:
                file.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
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


def _write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    # The widest first, so that every tensor's bytes are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    here = {name: tensors[name].detach().cpu().contiguous() for name in order}
    summed = hashlib.sha256()
    header: dict[str, object] = {}
    end = 0
    for name, tensor in here.items():
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
        summed.update(_bytes_of(tensor))
    header["__metadata__"] = {"format": "pt", "sha256": summed.hexdigest()}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in here.values():
        file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> ctypes.Array | bytes:
    # No NumPy needed, and no copy; valid while the tensor lives.
    count = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * count).from_address(tensor.data_ptr()) if count else b""


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
