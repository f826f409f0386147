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
from pathlib import Path

import torch
from torch import Tensor

from fastlora.errors import UserError
from fastlora.finetune.files import atomic_write
from fastlora.finetune.gpt2 import GPT2

FILES = ("model.safetensors", "model.npz")
_HUB_NAMES = ("gpt2", "openai-community/gpt2")
_PARTS = {"attn.c_proj": "attention.out", "mlp.c_fc": "expand", "mlp.c_proj": "contract"}
_NORMS = {"ln_1": "norm_1", "ln_2": "norm_2"}
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
    """Fill every weight of `model` but its head from the file, of either naming and any float dtype.

    Raises UserError, and leaves the model as it was, when the file is damaged, misses a tensor, or one has another
    shape than the model or a value that is not finite.
    """
    theirs = _read(path)
    ours = {}
    for name, want in model.state_dict().items():
        if name.startswith("head."):
            continue
        value = _take(theirs, name, path)
        if value.shape != want.shape:
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)}, this model's is {tuple(want.shape)}")
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
        ours[name] = value.to(want.dtype)
    model.load_state_dict(ours, strict=False)


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


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of the file under Hugging Face's names without the prefix `transformer.`."""
    try:
        if path.suffix == ".npz":
            import numpy

            with numpy.load(path, allow_pickle=False) as archive:
                tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            from safetensors.torch import load_file

            tensors = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile, numpy and safetensors each have their own
        raise UserError(f"{path}: not a readable weights file ({str(error).splitlines()[0][:100]})") from None
    return {_without_openai(name).removeprefix("transformer."): value for name, value in tensors.items()}


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


def _transposed(key: str, value: Tensor) -> Tensor:
    """A linear weight between (out, in) and (in, out); everything else as it is."""
    return value.mT if ".c_" in key and key.endswith(".weight") else value


def _take(theirs: dict[str, Tensor], name: str, path: Path) -> Tensor:
    key, split = _their_name(name)
    if key not in theirs:
        raise UserError(f"{path}: holds no {key}, so it is not a GPT-2 of this size")
    value = theirs[key]
    if ".c_" in key and key.endswith(".weight"):
        if value.dim() == 3 and value.shape[0] == 1:  # OpenAI's linears are convolutions of width 1
            value = value[0]
        if value.dim() != 2:
            raise UserError(f"{path}: {key} has shape {tuple(value.shape)}, a matrix is needed")
    value = _transposed(key, value)
    if split is not None:
        if value.shape[0] % 3:
            raise UserError(f"{path}: {key} has {value.shape[0]} outputs, which is not query, key and value")
        value = value.chunk(3)[split]
    return value
