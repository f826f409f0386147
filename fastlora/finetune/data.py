"""Labelled texts from parquet files, tokenised once and held in memory; the batches that training reads.

A batch is (ids, offsets, labels): the words of all its texts one after the other, and where each text begins. Nothing
is padded between texts; words after the last text (`pad_to`) form a bag of their own, which no mean contains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.errors import UserError
from fastlora.finetune.vocabulary import PAD, Vocabulary


def read_texts(
    path: Path, classes: int, limit: int | None = None, text: str = "text", label: str = "label"
) -> tuple[list[str], list[int]]:
    """Texts and labels of a parquet file.

    Args:
        path: the file.
        classes: labels are 0 .. classes - 1.
        limit: take the first rows only.
        text, label: the columns' names.

    Raises:
        UserError: the file is missing, damaged or empty, lacks a column, or a row has no text or an unknown label.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        missing = [name for name in (text, label) if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names) or 'none'}")
        table = file.read(columns=[text, label])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged, a column's name is not UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: damaged or not a parquet file ({str(error).splitlines()[0][:90]})") from None
    table = table if limit is None else table.slice(0, limit)
    try:
        texts, labels = table.column(text).to_pylist(), table.column(label).to_pylist()
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged, a text is not UTF-8") from None
    if not texts:
        raise UserError(f"{path}: holds no rows")
    known = set(range(classes))
    for row, (words, number) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(words, str):
            raise UserError(f"{path}: row {row} has no text in column {text!r}")
        if type(number) is not int or number not in known:
            raise UserError(f"{path}: row {row} has the unknown label {number!r}; known are 0 to {classes - 1}")
    return texts, labels


class TextDataset(Dataset):
    """Encoded texts and their labels, in three flat tensors.

    Indexing and iterating give (label, ids); `batch` gives many rows at once, as `collate_batch` of them would.

    Args:
        texts: tokenised.
        labels: a class number for each.
        vocabulary: gives the words' numbers.

    Attributes:
        ids: int32 (words in all texts,).
        offsets: int64 (texts + 1,): where each text begins, and the end.
        labels: int64 (texts,).
    """

    def __init__(self, texts: Sequence[Sequence[str]], labels: Sequence[int], vocabulary: Vocabulary):
        if len(texts) != len(labels):
            raise ValueError(f"texts and labels must be as many, got {len(texts)} and {len(labels)}")
        rows = [vocabulary.encode(words) for words in texts]
        self.ids = torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, dtype=torch.int32)
        self.offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor([len(row) for row in rows], dtype=torch.int64), 0, out=self.offsets[1:])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        index = range(len(self))[index]
        return int(self.labels[index]), self.ids[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for label, (start, end) in zip(self.labels.tolist(), pairwise(self.offsets.tolist()), strict=True):
            yield label, self.ids[start:end]

    def words(self, rows: Tensor) -> int:
        """How many words the texts `rows` have together."""
        return int((self.offsets[rows + 1] - self.offsets[rows]).sum())

    def batch(self, rows: Tensor, pad_to: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of the texts `rows` (int64); see `collate_batch`."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        total = int(offsets[-1])
        source = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=total).add_(torch.arange(total))
        return _padded(self.ids[source], pad_to), offsets.int(), self.labels[rows]


def collate_batch(items: Sequence[tuple[int, Tensor]], pad_to: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of `items`, each (label, ids).

    Args:
        items: the rows of the batch.
        pad_to: ids are padded to a multiple of it. A GPU step is replayed only for shapes that it has seen.

    Returns:
        ids: int32 (words,), padding at the end.
        offsets: int32 (batch + 1,); the last is where the padding begins: it never enters a text's mean.
        labels: int64 (batch,).
    """
    lengths = torch.tensor([0] + [len(ids) for _, ids in items], dtype=torch.int32)
    ids = torch.cat([ids for _, ids in items])
    labels = torch.tensor([label for label, _ in items], dtype=torch.int64)
    return _padded(ids, pad_to), lengths.cumsum(0, dtype=torch.int32), labels


def _padded(ids: Tensor, multiple: int) -> Tensor:
    short = -len(ids) % multiple
    return torch.nn.functional.pad(ids, (0, short), value=PAD) if short else ids


def random_split(size: int, seed: int, valid: float = 0.05) -> tuple[Tensor, Tensor]:
    """Row numbers (train, valid) of a random split; at least one row in each. ValueError when `size` < 2."""
    if size < 2:
        raise ValueError(f"a split needs at least 2 rows, got {size}")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    held_out = min(size - 1, max(1, round(size * valid)))
    return order[held_out:], order[:held_out]
