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

from fastlora import env
from fastlora.errors import UserError, WorkError, shown
from fastlora.finetune.vocabulary import PAD, Vocabulary
from fastlora.regular_files import read_regular

# the programs hold all words in memory, some ten times the text: a table beyond either bound is no table of texts
MAX_FILE, MAX_TEXT, MAX_ROWS = 1 << 30, 1 << 30, 50_000_000
ROWS_AT_ONCE = 256  # few: a dictionary makes a row cost four bytes of the file, whatever its length


def read_texts(
    path: Path, classes: int, limit: int | None = None, text: str = "text", label: str = "label"
) -> tuple[list[str], list[int]]:
    """Texts and labels of a parquet file.

    Args:
        path: the file.
        classes: labels are 0 .. classes - 1.
        limit: take the first rows only; no more of the file is unpacked.
        text, label: the columns' names.

    Raises:
        UserError: the file is missing, damaged, empty or too large, lacks a column, or a row has no text or an unknown
            label.
        WorkError: there is not memory enough.
    """
    import pyarrow

    texts: list[str] = []
    labels: list[int] = []
    size = 0
    try:
        for words, numbers in _pieces(path, limit, text, label):
            for row, (said, number) in enumerate(zip(words, numbers, strict=True), len(texts)):
                if not isinstance(said, str):
                    raise UserError(f"{path}: row {row} has no text in column {text!r}")
                if number is None or not 0 <= number < classes:
                    raise UserError(f"{path}: row {row} has the unknown label {number}; known are 0 to {classes - 1}")
                size += len(said)
            if size > MAX_TEXT:
                raise UserError(f"{path}: holds more text than the {MAX_TEXT} characters that are read")
            texts += words
            labels += numbers
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except MemoryError:
        raise WorkError(f"{path}: there is not memory enough to read it; --train-samples takes fewer rows") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged, a text is not UTF-8{_hint(path)}") from None
    except (OSError, pyarrow.ArrowException) as error:
        why = shown(getattr(error, "strerror", None) or str(error)[:90])
        raise UserError(f"{path}: damaged or not a parquet file ({why}){_hint(path)}") from None
    return texts, labels


def _pieces(path: Path, limit: int | None, text: str, label: str) -> Iterator[tuple[list, list[int | None]]]:
    """The columns `text` and `label` of a file, a few rows at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        # out of memory: a chunk that claims to be larger than the file ends with it, reading ahead gains nothing
        content = pyarrow.BufferReader(read_regular(path, MAX_FILE))
        file = pyarrow.parquet.ParquetFile(content, pre_buffer=False)
        schema = file.schema_arrow
        names = schema.names
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged, a column's name is not UTF-8{_hint(path)}") from None
    for name in (text, label):
        if names.count(name) != 1:
            has = ", ".join(shown(other) for other in names[:10]) or "none"
            raise UserError(f"{path}: {'two columns' if name in names else 'no column'} {name!r}; it has {has}")
    if file.metadata.num_rows <= 0:  # less, where it is damaged
        raise UserError(f"{path}: holds no rows")
    types = pyarrow.types
    for name, needs, kinds in ((text, "texts", (types.is_string, types.is_large_string, types.is_string_view)),
                               (label, "whole numbers", (types.is_integer,))):  # fmt: skip
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not any(fits(kind) for fits in kinds):
            raise UserError(f"{path}: column {name!r} holds {shown(str(kind)[:60])}, not {needs}")
    _check_claims(path, file.metadata, limit)
    left = file.metadata.num_rows if limit is None else limit
    for batch in file.iter_batches(min(left, ROWS_AT_ONCE), columns=[text, label]):
        batch = batch.slice(0, left)
        yield batch.column(text).to_pylist(), batch.column(label).to_pylist()
        left -= len(batch)
        if not left:
            break


def _check_claims(path: Path, metadata, limit: int | None) -> None:
    """UserError when what the file says of the rows to be read is too much.

    Of the groups of rows, not of their columns: pyarrow 26 ends the process at damage in a column's statistics.
    """
    rows = unpacked = 0
    for i in range(metadata.num_row_groups):
        if limit is not None and rows >= limit:
            break
        group = metadata.row_group(i)
        rows += group.num_rows
        unpacked += group.total_byte_size
    if unpacked > MAX_TEXT or min(rows, limit or rows) > MAX_ROWS:
        raise UserError(f"{path}: says that it holds {rows} rows of together {unpacked} bytes; at most {MAX_ROWS} rows "
                        f"of {MAX_TEXT} bytes are read")


def _hint(path: Path) -> str:
    """What to do about damage: files in the cache were made by this package, which makes them again."""
    return "; delete it, and it is made again" if env.cache_dir() in Path(path).parents else ""


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
