"""From the files that the data sets' homes give to those that training reads; and `fastlora prepare spam`."""

from __future__ import annotations

import argparse
import csv
import io
import random
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastlora.errors import UserError, WorkError, shown
from fastlora.files import atomic_write, read_regular, write_bytes
from fastlora.finetune.options import folder_name

SEED = 123
LABELS = ("ham", "spam")
_REVIEW = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d+)_\d+\.txt")
_MOST = 100_000_000  # bytes of the SMS Spam Collection, two hundred times its size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastlora prepare spam`."""
    parser.add_argument("source", type=Path, help="the raw file: one message a line, label, tab, text")
    output = "data folder; the three files go to its folder spam/ (give it to train as --data)"
    parser.add_argument("--output", type=folder_name, required=True, help=output)


def main(args: argparse.Namespace) -> None:
    """Write `<args.output>/spam/{train,valid,test}.parquet` from `args.source`; UserError on a wrong source."""
    folder = args.output / "spam"
    try:
        parts = balanced_split(read_regular(args.source, _MOST), args.source)
    except OSError as error:
        raise UserError(f"{args.source}: cannot be read ({error.strerror})") from None
    for name in parts:
        if (folder / f"{name}.parquet").exists():
            raise UserError(f"{folder / name}.parquet exists already; name another --output")
    write_tables(folder, parts)
    print(f"{folder}: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items()) + " messages")


def balanced_split(content: bytes, source: Path) -> dict:
    """The balanced split of the raw SMS Spam Collection, as three frames with columns Label (0 ham, 1 spam) and Text.

    Every spam message (747) and as many ham messages, drawn and shuffled with seed 123, split 70/10/20: the split of
    Raschka, "Build a Large Language Model (From Scratch)", chapter 6. pandas' default quoting is kept on purpose: one
    stray quote then swallows two messages (5,572 rows instead of 5,574), and the published split was drawn from those.
    """
    import pandas as pd

    try:
        raw = pd.read_csv(io.BytesIO(content), sep="\t", header=None, names=["Label", "Text", "more"],
                          index_col=False, dtype=str, keep_default_na=False)  # fmt: skip
    except ValueError as error:  # pandas' own are kinds of it
        raise UserError(f"{source}: not a tab-separated text file ({shown(str(error)[:150])})") from None
    wrong = ~raw["Label"].isin(LABELS) | raw["Text"].isin(["", None]) | ~raw["more"].isin(["", None])
    if wrong.any():
        raise UserError(f"{source}: row {wrong.idxmax() + 1} is not 'ham' or 'spam', a tab and a text")
    spam, ham = raw[raw["Label"] == "spam"], raw[raw["Label"] == "ham"]
    if not 0 < len(spam) <= len(ham):
        raise UserError(f"{source}: {len(spam)} spam and {len(ham)} ham; at least one spam and as many ham are needed")
    balanced = pd.concat([ham.sample(len(spam), random_state=SEED), spam])[["Label", "Text"]]
    balanced["Label"] = balanced["Label"].map({label: i for i, label in enumerate(LABELS)}).astype("int64")
    balanced = balanced.sample(frac=1, random_state=SEED)
    first, second = int(len(balanced) * 0.7), int(len(balanced) * 0.7) + int(len(balanced) * 0.1)
    parts = {"train": balanced[:first], "valid": balanced[first:second], "test": balanced[second:]}
    return {name: part.reset_index(drop=True) for name, part in parts.items()}


def write_tables(folder: Path, frames: dict) -> None:
    """Write each frame to `<folder>/<its name>.parquet`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_bytes(folder / f"{name}.parquet", frame.to_parquet(index=False))


def convert(name: str, parts: Sequence[Path], folder: Path) -> None:
    """Make the files of data set `name` in `folder` out of `parts`; WorkError when these are not what they should be.

    Members of archives are read, never unpacked by their names.
    """
    try:
        if name == "imdb":
            write_tables(folder, {part: _frame(rows) for part, rows in _reviews(parts[0]).items()})
        elif name == "ag_news":
            write_tables(folder, {part.stem: _frame(_news(part)) for part in parts})
        elif name == "spam":
            with zipfile.ZipFile(parts[0]) as archive, archive.open("SMSSpamCollection") as member:
                write_tables(folder, balanced_split(member.read(_MOST), parts[0]))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for part in parts:
                with atomic_write(folder / part.name) as temporary:
                    shutil.copyfile(part, temporary)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError, ValueError, csv.Error) as error:
        raise WorkError(f"{parts[0]}: not the archive of {name} ({error})") from None


def _reviews(archive: Path) -> dict[str, list[tuple[str, int]]]:
    """(text, 0 negative or 1 positive) of aclImdb_v1.tar.gz by part, shuffled with seed 123."""
    found: dict[str, list] = {"train": [], "test": []}
    with tarfile.open(archive, "r:gz") as file:
        for member in file:
            match = _REVIEW.fullmatch(member.name)
            if match and member.isfile():
                text = file.extractfile(member).read().decode("utf-8")
                found[match[1]].append((int(match[2] == "pos"), int(match[3]), text))
    for reviews in found.values():
        reviews.sort()
        random.Random(SEED).shuffle(reviews)
    return {name: [(text, label) for label, _, text in reviews] for name, reviews in found.items()}


def _news(table: Path) -> list[tuple[str, int]]:
    """(text, label 0..3) of AG News's table: class 1..4, title, description."""
    with open(table, encoding="utf-8", newline="") as file:
        return [(f"{title} {text}", int(number) - 1) for number, title, text in csv.reader(file)]


def _frame(rows: Iterable[tuple[str, int]]):
    import pandas as pd

    return pd.DataFrame(rows, columns=["text", "label"])
