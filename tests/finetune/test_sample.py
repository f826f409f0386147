"""The made-up sample: a cache that heals."""

from __future__ import annotations

import os

import pandas as pd
import pytest

from fastlora.errors import UserError
from fastlora.finetune.sample import make_sample


@pytest.mark.parametrize("kind", ["cut", "empty", "pipe", "other rows"])
def test_a_damaged_file_is_made_anew(tmp_path, kind):
    path = make_sample(tmp_path) / "spam" / "test.parquet"
    good, untouched = path.read_bytes(), (tmp_path / "imdb" / "test.parquet").stat().st_mtime_ns
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "other rows":
        pd.DataFrame({"Text": ["a"], "Label": [0]}).to_parquet(path)
    else:
        path.write_bytes(good[: len(good) // 2 if kind == "cut" else 0])
    make_sample(tmp_path)
    assert path.read_bytes() == good
    assert (tmp_path / "imdb" / "test.parquet").stat().st_mtime_ns == untouched


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "spam" / "test.parquet").mkdir(parents=True)
    with pytest.raises(UserError, match=r"test\.parquet: a folder .* delete it"):
        make_sample(tmp_path)
