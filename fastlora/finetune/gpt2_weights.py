"""GPT-2's weights from and to files: Hugging Face's `model.safetensors`, and the names of OpenAI's release.

| this project                           | Hugging Face              | OpenAI                              |
| -------------------------------------- | ------------------------- | ----------------------------------- |
| tokens.weight, positions.weight        | wte.weight, wpe.weight    | model/wte, model/wpe                |
| blocks.0.attention.{query,key,value}   | h.0.attn.c_attn           | model/h0/attn/c_attn, w (1, K, 3K)  |
| blocks.0.attention.out                 | h.0.attn.c_proj           | model/h0/attn/c_proj                |
| blocks.0.{expand,contract}             | h.0.mlp.{c_fc,c_proj}     | model/h0/mlp/{c_fc,c_proj}          |
| blocks.0.{norm_1,norm_2}, norm         | h.0.{ln_1,ln_2}, ln_f     | model/h0/{ln_1,ln_2}, ln_f: g and b |

Both of theirs keep a linear weight as (in, out), and query, key and value side by side in one.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

from fastlora import regular_files
from fastlora.errors import UserError, shown
from fastlora.finetune.files import atomic_write
from fastlora.finetune.gpt2 import GPT2
from fastlora.regular_files import check_regular

FILES = ("model.safetensors", "model.npz")
_HUB_NAMES = ("gpt2", "openai-community/gpt2")
_PARTS = {"attn.c_proj": "attention.out", "mlp.c_fc": "expand", "mlp.c_proj": "contract"}
_NORMS = {"ln_1": "norm_1", "ln_2": "norm_2"}
_DTYPES = ("F16", "BF16", "F32", "F64", "<f2", "<f4", "<f8")  # in safetensors, and in numpy's files
_SPLIT = ("attention.query", "attention.key", "attention.value")


def find(folder: Path | None) -> Path:
    """The file of GPT-2 weights in `folder`; with None, `model.safetensors` of gpt2 in the Hugging Face hub's cache.

    Raises UserError, saying what to do, when there is none.
    """
    if folder is not None:
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"--weights {folder}: holds no {' or '.join(FILES)}")
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        try_to_load_from_cache = lambda *_: None  # noqa: E731
    for name in _HUB_NAMES:
        found = try_to_load_from_cache(name, FILES[0])
        if isinstance(found, str):
            return Path(found)
    raise UserError("GPT-2's weights are not in the Hugging Face hub's cache; `hf download gpt2 model.safetensors` "
                    "fetches them, or give --weights DIR or --weights random")


def load(model: GPT2, path: Path) -> None:
    """Fill every weight of `model` but its head from the file, of either naming, in float16, bfloat16, 32 or 64.

    Only these weights are read, each after its shape was compared: memory is bounded by the model's.

    Raises UserError, and leaves the model as it was, when the file is damaged, misses a tensor, or one has another
    shape than the model, another dtype, or a value that is not finite in the model's.
    """
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    ours: dict[str, Tensor] = {}
    with _opened(path) as file:
        for name, want in state.items():
            key, split = _their_name(name)
            if split:  # came along with the query
                continue
            names = [name] if split is None else [name.replace(_SPLIT[0], part) for part in _SPLIT]
            value = _transposed(key, _read(file, key, _their_shape(key, want, len(names)), path))
            for name, part in zip(names, value.chunk(len(names)), strict=True):
                ours[name] = part.to(want.dtype, copy=True)
                if not ours[name].isfinite().all():
                    raise UserError(f"{path}: {key} holds values that are not finite in {want.dtype}")
    model.load_state_dict(ours, strict=False)


def sha256(path: Path) -> str:
    """The digest of a file of weights; UserError when it cannot be read."""
    try:
        return regular_files.sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def save(model: GPT2, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` as transformers reads them (`GPT2Model.from_pretrained(folder)`).

    The head goes along as `score.weight` and `score.bias`. The model must not hold LoRA layers.
    """
    from safetensors.torch import save_file

    theirs: dict[str, Tensor] = {}
    state = model.state_dict()
    for name, value in state.items():
        key, split = _their_name(name)
        if split is not None:
            if split == 0:
                parts = [state[name.replace(_SPLIT[0], part)] for part in _SPLIT]
                theirs[key] = _transposed(key, torch.cat(parts)).contiguous()
        else:
            theirs[key] = _transposed(key, value).contiguous()
    config = model.config
    about = {
        "architectures": ["GPT2Model"], "model_type": "gpt2", "vocab_size": config.vocabulary,
        "n_positions": config.context, "n_embd": config.width, "n_head": config.heads, "n_layer": config.layers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(theirs, temporary, metadata={"format": "pt"})
    with atomic_write(folder / "config.json") as temporary:
        Path(temporary).write_text(json.dumps(about, indent=2) + "\n")


class _File:
    """The tensors of a file under Hugging Face's names without the prefix `transformer.`; none read yet.

    Args:
        names: as the file has them.
        about: (dtype, shape) of one of these, without its numbers.
        read: one of them.
    """

    def __init__(self, names: Iterable[str], about: Callable, read: Callable):
        self.about, self.read = about, read
        self.names: dict[str, str] = {}
        for name in names:
            key = _without_openai(name).removeprefix("transformer.")
            if key in self.names:
                raise ValueError(f"both {shown(self.names[key])} and {shown(name)}")
            self.names[key] = name


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """The file, open; whatever its reader raises becomes a UserError that names it."""
    try:
        check_regular(path)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                yield _File(members, partial(_npy_header, archive), partial(_npy, archive))
        else:
            with safe_open(path, framework="pt") as file:
                def about(name: str):
                    entry = file.get_slice(name)
                    return entry.get_dtype(), tuple(entry.get_shape())

                yield _File(file.keys(), about, file.get_tensor)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile, zlib, numpy and safetensors each have their own
        raise UserError(f"{path}: not a readable weights file ({shown(str(error))})") from None


def _npy_header(archive: zipfile.ZipFile, name: str) -> tuple[str, tuple[int, ...]]:
    with archive.open(f"{name}.npy") as member:
        version = numpy.lib.format.read_magic(member)
        read = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(member)
        return dtype.str, shape


def _npy(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(f"{name}.npy") as member:
        array = numpy.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{name}.npy is longer than its header says")
        return torch.from_numpy(array)


def _read(file: _File, key: str, wanted: tuple[int, ...], path: Path) -> Tensor:
    """One tensor, of the wanted shape and a dtype of `_DTYPES`."""
    if key not in file.names:
        raise UserError(f"{path}: holds no {key}, so it is not a GPT-2 of this size")
    dtype, shape = file.about(file.names[key])
    # OpenAI's linears are convolutions of width 1.
    if shape not in ((wanted, (1, *wanted)) if _is_linear(key) else (wanted,)):
        raise UserError(f"{path}: {key} has shape {shape}, this model's is {wanted}")
    if dtype not in _DTYPES:
        raise UserError(f"{path}: {key} is {dtype}; weights are float16, bfloat16, float32 or float64")
    return file.read(file.names[key]).reshape(wanted)


def _their_shape(key: str, ours: Tensor, parts: int) -> tuple[int, ...]:
    """The shape in a file of a tensor that is `parts` side by side of the shape of `ours`."""
    shape = (ours.shape[0] * parts, *ours.shape[1:])
    return shape[::-1] if _is_linear(key) else shape


def _without_openai(name: str) -> str:
    """`model/h0/attn/c_attn/w` to `h.0.attn.c_attn.weight`; a name of Hugging Face's stays."""
    if not name.startswith("model/"):
        return name
    parts = re.sub(r"^h(\d+)/", r"h/\1/", name.removeprefix("model/")).split("/")
    ending = {"w": "weight", "g": "weight", "b": "bias"}.get(parts[-1])
    return ".".join([*parts[:-1], ending] if ending else [*parts, "weight"])


def _their_name(name: str) -> tuple[str, int | None]:
    """Hugging Face's name of one of our tensors, and which third of it when it is query, key or value."""
    if name.startswith("blocks."):
        _, index, *middle, ending = name.split(".")
        part = ".".join(middle)
        if part in _SPLIT:
            return f"h.{index}.attn.c_attn.{ending}", _SPLIT.index(part)
        reverse = {ours: theirs for theirs, ours in (_PARTS | _NORMS).items()}
        return f"h.{index}.{reverse[part]}.{ending}", None
    top, ending = name.split(".")
    return {"tokens": "wte", "positions": "wpe", "norm": "ln_f", "head": "score"}[top] + f".{ending}", None


def _is_linear(key: str) -> bool:
    return ".c_" in key and key.endswith(".weight")


def _transposed(key: str, value: Tensor) -> Tensor:
    """A linear weight between (out, in) and (in, out); everything else as it is."""
    return value.mT if _is_linear(key) else value
