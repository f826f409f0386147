"""`fastlora prepare spam`: the raw SMS Spam Collection turned into the balanced split that `train spam` reads.

Every spam message (747) and as many ham messages, drawn and shuffled with seed 123, split 70/10/20: the split of
Raschka, "Build a Large Language Model (From Scratch)", chapter 6.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from fastlora.errors import UserError, WorkError, shown
from fastlora.finetune.files import FULL, atomic_write
from fastlora.finetune.options import folder_name
from fastlora.regular_files import read_regular

HELP = "turn a raw SMSSpamCollection file into spam/{train,valid,test}.parquet"
SEED = 123
LABELS = ("ham", "spam")
MAX_BYTES = 100_000_000  # two hundred times the collection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastlora prepare spam`."""
    parser.add_argument("source", type=Path, help="the raw file: one message a line, label, tab, text")
    parser.add_argument("--output", type=folder_name, required=True,
                        help="data folder; the three files go to its folder spam/ (give it to train as --data)")


def main(args: argparse.Namespace) -> None:
    """Write `<args.output>/spam/{train,valid,test}.parquet` from `args.source`; UserError on a wrong source."""
    parts = balanced_split(args.source)
    folder = args.output / "spam"
    for name in parts:
        if (folder / f"{name}.parquet").exists():
            raise UserError(f"{folder / name}.parquet exists already; name another --output")
    write_split(parts, folder)
    print(f"{folder}: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items()) + " messages")


def balanced_split(source: Path) -> dict:
    """The balanced 70/10/20 split of the raw file, as three frames with columns Label (0 ham, 1 spam) and Text.

    pandas' default quoting is kept on purpose: one stray quote then swallows two messages (5,572 rows instead of
    5,574), and the published split was drawn from those rows.
    """
    import pandas as pd

    try:
        content = io.BytesIO(read_regular(source, MAX_BYTES))
        # nothing is guessed: not a compression by the name, not an index, numbers or missing values among the texts
        raw = pd.read_csv(content, sep="\t", header=None, names=["Label", "Text", "more"], encoding="utf-8",
                          index_col=False, dtype=str, keep_default_na=False)  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{source}: not a tab-separated text file ({shown(str(error)[:150])})") from None
    more = raw.pop("more")
    strange = raw[~raw["Label"].isin(LABELS) | raw["Text"].isna() | (raw["Text"] == "") | ~(more.isna() | (more == ""))]
    if len(strange):
        raise UserError(f"{source}: row {strange.index[0] + 1} is not 'ham' or 'spam', a tab and a text")
    spam, ham = raw[raw["Label"] == "spam"], raw[raw["Label"] == "ham"]
    if not 0 < len(spam) <= len(ham):
        raise UserError(f"{source}: {len(spam)} spam and {len(ham)} ham; at least one spam and as many ham are needed")
    balanced = pd.concat([ham.sample(len(spam), random_state=SEED), spam])
    balanced["Label"] = balanced["Label"].map({label: i for i, label in enumerate(LABELS)}).astype("int64")
    balanced = balanced.sample(frac=1, random_state=SEED).reset_index(drop=True)
    first, second = int(len(balanced) * 0.7), int(len(balanced) * 0.7) + int(len(balanced) * 0.1)
    parts = {"train": balanced[:first], "valid": balanced[first:second], "test": balanced[second:]}
    return {name: part.reset_index(drop=True) for name, part in parts.items()}


def write_split(parts: dict, folder: Path) -> None:
    """Write the frames of `balanced_split` to `<folder>/<name>.parquet`, each whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            with atomic_write(folder / f"{name}.parquet") as temporary:
                temporary.write_bytes(part.to_parquet(index=False))  # pandas itself takes no name that is not UTF-8
    except OSError as error:
        if error.errno in FULL:
            raise WorkError(f"{folder}: the disk is full") from None
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
