"""Every file that a stranger may hand us: a good one to damage, and how it is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors.numpy import load_file
from torch import nn

import fastlora
from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.finetune import files, gpt2, gpt2_weights, imdb
from fastlora.finetune.checkpoint import read_checkpoint, write_checkpoint
from fastlora.finetune.data import read_texts
from fastlora.finetune.report import read_report
from fastlora.finetune.text_classifier import TextClassifier
from fastlora.finetune.vectors import read_glove
from fastlora.finetune.vocabulary import Vocabulary


@dataclass(frozen=True)
class Loader:
    """`make(folder)` writes good files and returns the one to damage; `load(folder)` reads them and returns what came.

    Attributes:
        summed: whether a file with these bytes bears a checksum: then what is read from it is what was in the good one,
            or it is refused.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], object]
    summed: Callable[[bytes], bool] = lambda content: False


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def _adapter(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = fastlora.inject(_model(), r=2, target_modules="all-linear")
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.lora_B.normal_()
        fastlora.save_adapter(model, folder)
        return folder / name

    return make


def _loaded(model: nn.Module, load: Callable[[nn.Module], object]) -> object:
    """The loaded model's numbers; a refused file must have left every bit of the model as it was."""
    before = {name: (t, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    try:
        load(model)
    except Exception:
        now = model.state_dict(keep_vars=True)
        if now.keys() != before.keys() or any(now[n] is not t or not torch.equal(t, c) for n, (t, c) in before.items()):
            raise AssertionError("the file was refused, and the model was changed") from None
        raise
    state = model.state_dict()
    if not all(t.isfinite().all() for t in state.values()):
        raise AssertionError("numbers that are not finite were loaded")
    return {name: t.tolist() for name, t in state.items()}


def _load_adapter(folder: Path) -> object:
    return _loaded(_model(), lambda model: fastlora.load_adapter(model, folder))


def _bears_checksum(content: bytes) -> bool:
    """PEFT's own adapters bear none, and are read for what they say."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return "sha256" in header["__metadata__"]
    except (ValueError, KeyError, TypeError):
        return False


def _make_checkpoint(folder: Path) -> Path:
    write_checkpoint(folder / "c.safetensors", {"a": torch.arange(12.0).view(3, 4)}, {"epoch": 3, "rows": [1, 2]})
    return folder / "c.safetensors"


def _load_checkpoint(folder: Path) -> object:
    tensors, state = read_checkpoint(folder / "c.safetensors")
    return {name: t.tolist() for name, t in tensors.items()}, state


def _make_parquet(folder: Path) -> Path:
    import pandas as pd

    pd.DataFrame({"text": ["one two", "three", "four five six"], "label": [0, 1, 1]}).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def _write(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def _load_glove(folder: Path) -> object:
    vectors, found = read_glove(folder / "v.txt", Vocabulary(["film", "good", "bad"]))
    if not vectors.isfinite().all():
        raise AssertionError("numbers that are not finite were loaded")
    return found


def _gpt2() -> gpt2.GPT2:
    torch.manual_seed(0)
    return gpt2.GPT2(gpt2.GPT2Config(vocabulary=7, context=4, width=4, heads=2, layers=1))


def _make_gpt2(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        gpt2_weights.save(_gpt2(), folder)
        if name.endswith(".npz"):
            numpy.savez(folder / name, **load_file(folder / "model.safetensors"))
        return folder / name

    return make


def _make_run(folder: Path) -> Path:
    """What `train imdb` leaves, as far as `predict` reads it, of a tiny model."""
    torch.manual_seed(0)
    model = TextClassifier(torch.randn(5, 4), len(imdb.LABELS), hidden=3)
    write_checkpoint(folder / imdb.MODEL, model.state_dict(), {"data": "", "run": "", "pretrained": {}})
    fastlora.save_adapter(fastlora.inject(model, r=2, target_modules=["fc1"]), folder, modules_to_save=[])
    Vocabulary(["film", "good", "bad"]).save(folder / imdb.VOCABULARY)
    (folder / files.REPORT).write_text(json.dumps({"task": "imdb", "rank": 2}))
    return folder / imdb.MODEL


_SETTINGS = {"task": "imdb", "data": "sample", "lr": 0.5, "seed": 0, "vectors": None}


def _make_settings(folder: Path) -> Path:
    with files.run_folder(folder, _SETTINGS, resume=False):
        return folder / files.SETTINGS


def _load_settings(folder: Path) -> object:
    """Whether the run would go on; neither that nor a refusal may add a file or remove one."""
    before = sorted(folder.iterdir())
    try:
        with files.run_folder(folder, _SETTINGS, resume=True) as begun:
            return begun
    finally:
        if sorted(folder.iterdir()) != before:
            raise AssertionError("the run's folder was changed")


_GLOVE = "".join(f"{word} {' '.join(['0.25'] * 100)}\n" for word in ("film", "the", "bad"))
LOADERS = {
    "adapter": Loader(_adapter(WEIGHTS_NAME), _load_adapter, _bears_checksum),
    "config": Loader(_adapter(CONFIG_NAME), _load_adapter),
    "checkpoint": Loader(_make_checkpoint, _load_checkpoint, lambda content: True),
    "parquet": Loader(_make_parquet, lambda folder: read_texts(folder / "t.parquet", 2)),
    "vocabulary": Loader(_write("w.json", json.dumps(["film", "good", "bad"])),
                         lambda folder: Vocabulary.load(folder / "w.json").words),
    "vectors": Loader(_write("v.txt", _GLOVE), _load_glove),
    "gpt2": Loader(_make_gpt2("model.safetensors"), lambda folder: _loaded(
        _gpt2(), lambda model: gpt2_weights.load(model, folder / "model.safetensors"))),
    "gpt2-npz": Loader(_make_gpt2("model.npz"), lambda folder: _loaded(
        _gpt2(), lambda model: gpt2_weights.load(model, folder / "model.npz"))),
    "run": Loader(_make_run, lambda folder: imdb.load_predictor(folder)(["a good film"]), lambda content: True),
    "settings": Loader(_make_settings, _load_settings),
    "report": Loader(_write("report.json", json.dumps({"task": "imdb", "rank": 2})), read_report),
}  # fmt: skip


INSERTED = (b"../../", b"NaN", b"1e999", b"[" * 3000, b'{"a":' * 2000, b"\xff\xfe", b'"', b"\n")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to three things done to it that disks, networks and enemies do."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 4, 8, 64)))
        kind = rng.randrange(10)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:end] = rng.randbytes(end - at)
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at:end] * rng.choice((1, 2, 100))
        elif kind == 5:
            data[at:end] = b"\0" * (end - at)
        elif kind == 6:
            data[at : at + 8] = rng.choice((2**63 - 1, 2**31, 2**40, 2**64 - 1, len(data))).to_bytes(8, "little")
        elif kind == 7:
            data[at:at] = rng.choice(INSERTED)
        elif kind == 8:
            data[:8] = rng.choice((0, 1, 2**62, 10**8, len(data), len(data) * 2)).to_bytes(8, "little")
        else:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(data)
