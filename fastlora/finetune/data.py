"""Data: where it is, labelled texts out of parquet files, and the batches that the trainer reads."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastlora import env
from fastlora.errors import UserError, shown
from fastlora.files import read_regular, sha256
from fastlora.finetune import parallel
from fastlora.finetune.homes import FILES, fetch, missing

Batch = tuple[Tensor, ...]  # the model's inputs, then the labels
MAX_FILE, MAX_TEXT = 1 << 30, 1 << 30  # the programs hold all words in memory, some ten times the text


def locate(where: str, *needed: str) -> Path:
    """The folder that holds the data sets `needed` (keys of `FILES`); UserError when it or one of its files is missing.

    `where` is `--data`: a folder; "sample", made by the package; or "auto": the folder named by FASTLORA_DATA, then the
    cache, then the data sets' public homes (WorkError for a download that failed).
    """
    if where == "sample":
        from fastlora.finetune.sample import VERSION, make_sample

        return make_sample(env.cache_dir() / f"sample-{VERSION}")
    if where != "auto":
        folder = env.expanded(where)
        if not (where and os.path.isdir(folder)):  # Path's own is_dir raises for a name that is too long
            raise UserError(f"--data {where!r}: no such folder")
        if absent := missing(folder, *needed):
            raise UserError(f"--data {where!r}: lacks {absent[0]}")
        return folder
    named, cache = env.data_dir(), env.cache_dir() / "data"
    if named is not None and not missing(named, *needed):
        return named
    for name in needed:
        fetch(name, cache)
    return cache


def data_digest(where: str, *needed: str) -> str:
    """A sha256 for the files that `locate` finds: a run goes on only with the very data that it began with.

    Of the sample, by its version: its files' bytes differ with the libraries that write them.
    """
    folder = locate(where, *needed)
    sums = [folder.name]
    if where != "sample":
        sums = [sha256(folder / file) for name in needed for file in FILES[name]]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def found() -> dict[str, str]:
    """For each data set where `auto` would find it without the network, or "not here"."""
    folders = [folder for folder in (env.data_dir(), env.cache_dir() / "data") if folder is not None]
    return {name: next((str(folder) for folder in folders if not missing(folder, name)), "not here") for name in FILES}


def read_texts(path: Path, classes: int, limit: int | None = None, columns=("text", "label"), least: int = 1) -> tuple:
    """The list of texts and that of labels (0 .. classes - 1) of a parquet file's `columns`, of its first `limit` rows.

    UserError for one that is missing, damaged, too large, without these columns, or of fewer than `least` rows.
    """
    import pyarrow
    import pyarrow.parquet

    texts, labels, size = [], [], 0
    text, label = columns
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(read_regular(path, MAX_FILE)))
        names = file.schema_arrow.names
        for name in columns:
            if names.count(name) != 1:
                has = ", ".join(map(shown, names[:10]))
                raise UserError(f"{path}: {'several columns' if name in names else 'no column'} {name!r}; it has {has}")
        batches = file.iter_batches(1024, columns=list(columns))
        rows = (row for batch in batches for row in zip(batch[text].to_pylist(), batch[label].to_pylist(), strict=True))
        for said, number in itertools.islice(rows, limit):
            if not isinstance(said, str) or number not in range(classes):
                raise UserError(f"{path}: row {len(texts)} is no text with one of the labels 0 to {classes - 1}, "
                                f"but has {label} {shown(number)}, {text} {shown(said)}")  # fmt: skip
            texts.append(said)
            labels.append(int(number))
            size += len(said)
            if size > MAX_TEXT:
                raise UserError(f"{path}: holds more text than the {MAX_TEXT} characters that are read")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        again = "; delete it, and it is made again" if env.cache_dir() in Path(path).parents else ""
        why = shown(getattr(error, "strerror", None) or str(error)[:90])
        raise UserError(f"{path}: damaged or not a parquet file ({why}){again}") from None
    if len(texts) < least:
        raise UserError(f"{path}: holds {len(texts) or 'no'} rows; at least {least} are needed")
    return texts, labels


def random_split(size: int, seed: int, valid: float = 0.05) -> tuple[Tensor, Tensor]:
    """Row numbers (train, valid) of a random split of two rows or more; at least one row in each."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    held_out = min(size - 1, max(1, round(size * valid)))
    return order[held_out:], order[:held_out]


@functools.lru_cache(maxsize=256)
def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """The row numbers in the order of an epoch, int64 (size,): a pure function of the seed and the epoch's number."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@dataclass
class Batches:
    """Batches of rows, by their number: nothing but an integer is needed to go on within an epoch."""

    size: int  # rows in the data set
    take: Callable[[Tensor], Batch]  # row numbers (int64, on the CPU) -> their batch
    batch_size: int  # rows per batch, in each of the processes that train together
    drop_last: bool = False  # leave out the last batch when it is short, as processes that train together must
    device: torch.device | str = "cpu"  # where the batches go. Copies to a GPU are asynchronous, from pinned memory

    def __post_init__(self):
        self.device, self._whole = torch.device(self.device), self.batch_size * parallel.size()

    def __len__(self) -> int:
        return self.size // self._whole if self.drop_last else -(-self.size // self._whole)

    def rows(self, i: int) -> int:
        """The rows of batch `i`, over all processes."""
        return min(self._whole, self.size - i * self._whole)

    def at(self, epoch: int, i: int, seeds: Sequence[int] = (0,)) -> Batch:
        """This process's part of batch `i` of an epoch: of each seed's own order, one after the other."""
        start, rows, rank, size = i * self._whole, self.rows(i), parallel.rank(), parallel.size()
        own = slice(start + rows * rank // size, start + rows * (rank + 1) // size)
        return self._place(torch.cat([shuffled(self.size, seed, epoch)[own] for seed in seeds]))

    def in_order(self, times: int = 1) -> Iterator[Batch]:
        """Whole batches in the rows' order, each `times` over, dealt out to the processes in turn: for evaluation."""
        for i in range(parallel.rank(), len(self), parallel.size()):
            start = i * self._whole
            yield self._place(torch.arange(start, start + self.rows(i)).repeat(times))

    def _place(self, rows: Tensor) -> Batch:
        batch = self.take(rows)
        if self.device.type == "cpu":
            return batch
        return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in batch)


@dataclass
class Data:
    """What a run reads."""

    folder: Path
    train: Batches
    valid: Batches
    test: Batches
    tokens: int  # of an epoch
    facts: dict = field(default_factory=dict)  # what the report says of it
    shape: tuple[int, ...] = ()  # of a row, in the model
