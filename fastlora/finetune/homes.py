"""The data sets' public homes: fetched with a checksum and turned into parquet; and `fastlora prepare spam`.

Where the sums come from: IMDb's sha256 is in Hugging Face's and scikit-learn users' fetchers, torchtext pins its md5
(7c2ac02c...); AG News's two files have the md5 sums that torchtext pins (b1a00f82..., d52ea96a...); those of the SMS
archive and of its member are stated by several independent users of UCI's copy; tiktoken pins GPT-2's.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import io
import os
import random
import re
import shutil
import socket
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.error import HTTPError

from filelock import FileLock
from torch.hub import download_url_to_file

from fastlora.errors import UserError, WorkError, shown
from fastlora.files import FULL, clear_leftovers, read_regular, sha256, write_bytes
from fastlora.finetune.options import folder_name

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 3
SEED = 123  # of the splits
_REVIEW = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d+)_\d+\.txt")
_MOST = 100_000_000  # bytes of the SMS Spam Collection, two hundred times its size

_IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
_SPAM = "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {  # of a data set, in the folder of `--data`
    "imdb": ("imdb/train.parquet", "imdb/test.parquet"),
    "ag_news": ("ag_news/train.parquet", "ag_news/test.parquet"),
    "spam": ("spam/train.parquet", "spam/valid.parquet", "spam/test.parquet"),
    "gpt2": ("gpt2/encoder.json", "gpt2/vocab.bpe"),
}
SOURCES = {  # where the files of a data set are, and the sha256 that each must have
    "imdb": {_IMDB: "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"},
    "ag_news": {
        _AG_NEWS + "train.csv": "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
        _AG_NEWS + "test.csv": "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
    },
    "spam": {_SPAM: "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3"},
    "gpt2": {
        _GPT2 + "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        _GPT2 + "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    },
}


def missing(folder: Path, *needed: str) -> list[str]:
    """Those files of the data sets `needed` that `folder` lacks."""
    return [file for name in needed for file in FILES[name] if not os.path.isfile(folder / file)]


def fetch(name: str, folder: Path) -> None:
    """Make the files of data set `name` in `folder`, unless they are there, from its public home.

    Several processes may ask at once: one works, the others wait and find the files. WorkError for what failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if missing(folder, name):
            downloads = folder / f".{name}"
            convert(name, [download(*source, downloads) for source in SOURCES[name].items()], folder / name)
            shutil.rmtree(downloads, ignore_errors=True)


def download(url: str, sum: str, folder: Path) -> Path:
    """Fetch `url`, whose sha256 is `sum`, into `folder`, unless it is there, with a progress bar; its path.

    WorkError when the server refused, or the third attempt failed too: no connection, a wrong checksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, before = folder / url.rpartition("/")[2], socket.getdefaulttimeout()
    if path.exists() and sha256(path) == sum:
        return path
    socket.setdefaulttimeout(TIMEOUT)  # torch sets none
    try:
        for _ in range(ATTEMPTS):
            try:
                download_url_to_file(url, str(path), hash_prefix=sum)
                return path
            except (OSError, http.client.HTTPException, RuntimeError) as error:  # the last for a wrong checksum
                if getattr(error, "errno", None) in FULL:
                    raise
                why = shown(str(error) or type(error).__name__)
                if isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429):
                    break
    finally:
        socket.setdefaulttimeout(before)
    raise WorkError(f"{url}: cannot be fetched ({why}); give a folder with the data by --data DIR, "
                    "or try --data sample")  # fmt: skip


def convert(name: str, parts: Sequence[Path], folder: Path) -> None:
    """Make the files of data set `name` in `folder` out of `parts`. Members of archives are not unpacked by names."""
    if name == "imdb":
        write_tables(folder, _reviews(parts[0]))
    elif name == "ag_news":
        write_tables(folder, {part.stem: _news(part) for part in parts})
    elif name == "spam":
        with zipfile.ZipFile(parts[0]) as archive:
            write_tables(folder, balanced_split(archive.read("SMSSpamCollection"), parts[0]), None)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        for part in parts:
            write_bytes(folder / part.name, part.read_bytes())


def write_tables(folder: Path, tables: dict, columns: Sequence[str] = ("text", "label")) -> None:
    """Write each table, a frame or rows of `columns`, to `<folder>/<its name>.parquet`, whole or not at all."""
    import pandas as pd

    for name, rows in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, pd.DataFrame(rows, columns=columns).to_parquet(index=False))


def _reviews(archive: Path) -> dict[str, list[tuple[str, int]]]:
    """(text, 0 negative or 1 positive) of aclImdb_v1.tar.gz by part, shuffled."""
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
    wrong = ~raw["Label"].isin(["ham", "spam"]) | raw["Text"].isin(["", None]) | ~raw["more"].isin(["", None])
    if wrong.any():
        raise UserError(f"{source}: row {wrong.idxmax() + 1} is not 'ham' or 'spam', a tab and a text")
    spam, ham = raw[raw["Label"] == "spam"], raw[raw["Label"] == "ham"]
    if not 0 < len(spam) <= len(ham):
        raise UserError(f"{source}: {len(spam)} spam and {len(ham)} ham; at least one spam and as many ham are needed")
    balanced = pd.concat([ham.sample(len(spam), random_state=SEED), spam])[["Label", "Text"]]
    balanced["Label"] = (balanced["Label"] == "spam").astype("int64")
    balanced = balanced.sample(frac=1, random_state=SEED).reset_index(drop=True)
    train, valid = int(len(balanced) * 0.7), int(len(balanced) * 0.1)
    return {"train": balanced[:train], "valid": balanced[train : train + valid], "test": balanced[train + valid :]}


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
    if folder.exists():
        raise UserError(f"{folder} exists already; name another --output")
    write_tables(folder, parts, None)
    print(f"{folder}: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items()) + " messages")
