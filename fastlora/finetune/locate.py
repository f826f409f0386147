"""Where the data is: a folder named by the user, the sample, or wherever `auto` finds or fetches it."""

from __future__ import annotations

import os
from pathlib import Path

from fastlora import env
from fastlora.errors import UserError

FILES = {
    "imdb": ("imdb/train.parquet", "imdb/test.parquet"),
    "ag_news": ("ag_news/train.parquet", "ag_news/test.parquet"),
    "spam": ("spam/train.parquet", "spam/valid.parquet", "spam/test.parquet"),
    "gpt2": ("gpt2/encoder.json", "gpt2/vocab.bpe"),
}


def locate(where: str, *needed: str) -> Path:
    """The folder that holds the data sets `needed` (keys of `FILES`).

    Args:
        where: `--data`: a folder; "sample", made by the package; or "auto": the folder named by FASTLORA_DATA, then
            the cache, then the data sets' public homes. A folder that is really named so can be given as ./auto.

    Raises:
        UserError: the folder or one of its files is missing.
        WorkError: a download failed.
    """
    if where == "sample":
        from fastlora.finetune.sample import VERSION, make_sample

        return make_sample(env.cache_dir() / f"sample-{VERSION}")
    if where != "auto":
        folder = env.expanded(where)
        if not (where and os.path.isdir(folder)):  # Path's own is_dir raises for a name that is too long
            raise UserError(f"--data {where!r}: no such folder")
        absent = missing(folder, *needed)
        if absent:
            raise UserError(f"--data {where!r}: lacks {absent[0]}")
        return folder
    named = env.data_dir()
    if named is not None and not missing(named, *needed):
        return named
    from fastlora.finetune.download import fetch

    cache = env.cache_dir() / "data"
    for name in needed:
        if missing(cache, name):
            fetch(name, cache)
    return cache


def missing(folder: Path, *needed: str) -> list[str]:
    """Those files of the data sets `needed` that `folder` lacks."""
    return [file for name in needed for file in FILES[name] if not os.path.isfile(folder / file)]


def found() -> dict[str, str]:
    """For each data set where `auto` would find it without the network, or "not here"."""
    folders = [folder for folder in (env.data_dir(), env.cache_dir() / "data") if folder is not None]
    return {name: next((str(folder) for folder in folders if not missing(folder, name)), "not here") for name in FILES}
