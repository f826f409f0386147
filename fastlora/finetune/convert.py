"""From the files that the data sets' homes give to the parquet files that training reads."""

from __future__ import annotations

import csv
import random
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fastlora.errors import WorkError
from fastlora.finetune.files import atomic_write

_REVIEW = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d+)_\d+\.txt")
_SPAM_MEMBER, _SPAM_MOST = "SMSSpamCollection", 10_000_000


def imdb(parts: Sequence[Path], folder: Path) -> None:
    """aclImdb_v1.tar.gz to train and test.parquet (text, label 0 negative, 1 positive), shuffled with seed 123.

    Members are read, never unpacked by their names.
    """
    rows: dict[str, list] = {"train": [], "test": []}
    try:
        with tarfile.open(parts[0], "r:gz") as archive:
            for member in archive:
                match = _REVIEW.fullmatch(member.name)
                if match and member.isfile():
                    text = archive.extractfile(member).read().decode("utf-8")
                    rows[match[1]].append((int(match[2] == "pos"), int(match[3]), text))
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise WorkError(f"{parts[0]}: not the archive of the IMDb reviews ({error})") from None
    for name, reviews in rows.items():
        reviews.sort()
        random.Random(123).shuffle(reviews)
        _write(folder / f"{name}.parquet", [(text, label) for label, _, text in reviews])


def ag_news(parts: Sequence[Path], folder: Path) -> None:
    """train.csv and test.csv (class 1..4, title, description) to train and test.parquet (text, label 0..3)."""
    for part, name in zip(parts, ("train", "test"), strict=True):
        with open(part, encoding="utf-8", newline="") as file:
            try:
                rows = [(f"{title} {text}", int(number) - 1) for number, title, text in csv.reader(file)]
            except (csv.Error, ValueError) as error:
                raise WorkError(f"{part}: not AG News's table ({error})") from None
        _write(folder / f"{name}.parquet", rows)


def spam(parts: Sequence[Path], folder: Path) -> None:
    """UCI's archive to the balanced split, as `fastlora prepare spam` makes it of the raw file."""
    from fastlora.finetune.prepare import balanced_split, write_split

    raw = parts[0].with_name(_SPAM_MEMBER)
    try:
        with zipfile.ZipFile(parts[0]) as archive, archive.open(_SPAM_MEMBER) as member, atomic_write(raw) as temporary:
            temporary.write_bytes(member.read(_SPAM_MOST))
    except (zipfile.BadZipFile, KeyError) as error:
        raise WorkError(f"{parts[0]}: not the archive of the SMS Spam Collection ({error})") from None
    write_split(balanced_split(raw), folder)
    raw.unlink()


def gpt2(parts: Sequence[Path], folder: Path) -> None:
    """encoder.json and vocab.bpe as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with atomic_write(folder / part.name) as temporary:
            temporary.write_bytes(part.read_bytes())


CONVERTERS: dict[str, Callable[[Sequence[Path], Path], None]] = {
    "imdb": imdb, "ag_news": ag_news, "spam": spam, "gpt2": gpt2,
}


def _write(path: Path, rows: Sequence[tuple[str, int]]) -> None:
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(pd.DataFrame(rows, columns=["text", "label"]).to_parquet(index=False))
