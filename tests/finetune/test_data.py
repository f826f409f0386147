"""Tables read, split and batched; the made-up sample."""

from __future__ import annotations

import os

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch

from fastlora.errors import UserError
from fastlora.finetune import data, parallel
from fastlora.finetune.data import Batches, random_split, read_texts
from fastlora.finetune.sample import make_sample


def parquet(path, **columns):
    pd.DataFrame(columns).to_parquet(path, index=False)
    return path


def test_batches_cover_each_row_once_in_an_order_of_seed_and_epoch():
    batches = Batches(10, lambda rows: (rows, rows), 4)
    assert len(batches) == 3
    first, again, other, seeded = (
        [batches.at(epoch, i, [seed])[0].tolist() for i in range(3)] for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    )
    assert first == again != other and seeded not in (first, other)
    assert sorted(row for batch in first for row in batch) == list(range(10))
    assert batches.at(0, 1, [1, 2])[0].tolist() == first[1] + seeded[1]
    assert [b[0].tolist() for b in batches.in_order()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [b[0].tolist() for b in batches.in_order(2)][2] == [8, 9, 8, 9]
    assert len(Batches(10, lambda rows: (rows, rows), 4, drop_last=True)) == 2


def test_random_split():
    train, valid = random_split(25_000, seed=3)
    assert (len(train), len(valid)) == (23_750, 1_250)
    assert sorted(torch.cat([train, valid]).tolist()) == list(range(25_000))
    assert torch.equal(random_split(25_000, seed=3)[1], valid)
    assert not torch.equal(random_split(25_000, seed=4)[1], valid)
    assert [len(part) for part in random_split(2, seed=0)] == [1, 1]


def test_read_texts_takes_the_first_rows(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["x", "y", "z"], label=[0, 1, 0])
    assert read_texts(path, 2) == (["x", "y", "z"], [0, 1, 0])
    assert read_texts(path, 2, limit=2) == (["x", "y"], [0, 1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["x"], "lable": [0]}, "no column 'label'; it has 'text', 'lable'"),
        ({"label": [0]}, "no column 'text'"),
        ({"text": ["x", "y"], "label": [0, 2]}, "row 1 is no text with one of the labels 0 to 1, but has label 2"),
        ({"text": ["x"], "label": [-1]}, "row 0 .* has label -1"),
        ({"text": ["x"], "label": ["pos"]}, "row 0 .* has label 'pos'"),
        ({"text": ["x"], "label": [0.5]}, r"row 0 .* has label 0\.5"),
        ({"text": ["x", None], "label": [0, 1]}, "row 1 .* has label 1, text None"),
        ({"text": [7], "label": [0]}, "row 0 .* has label 0, text 7"),
        ({"text": [], "label": []}, "holds no rows"),
    ],
)
def test_wrong_tables_are_named(tmp_path, columns, message):
    with pytest.raises(UserError, match=message) as caught:
        read_texts(parquet(tmp_path / "a.parquet", **columns), 2)
    assert "a.parquet" in str(caught.value) and "\n" not in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["x"], [0], [1]], names=["text", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns 'label'"):
        read_texts(tmp_path / "a.parquet", 2)


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "flipped", "folder"])
def test_damaged_files_are_named(tmp_path, damage):
    path = parquet(tmp_path / "a.parquet", text=["some text"] * 5000, label=[0, 1] * 2500)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        flipped = content[:8] + bytes(255 - b for b in content[8:200]) + content[200:]
        path.write_bytes({"text": b"text,label\n", "cut": content[: len(content) // 2], "flipped": flipped}[damage])
    with pytest.raises(UserError, match=r"a\.parquet"):
        read_texts(path, 2)


def test_the_sample_is_made_once_and_always_the_same(tmp_path):
    folder = make_sample(tmp_path / "sample")
    written = (folder / "imdb" / "train.parquet").stat().st_mtime_ns
    make_sample(folder)
    assert (folder / "imdb" / "train.parquet").stat().st_mtime_ns == written
    texts, labels = read_texts(folder / "imdb" / "train.parquet", 2)
    assert (len(texts), sum(labels)) == (2000, 1000)
    other = make_sample(tmp_path / "again")
    assert read_texts(other / "imdb" / "train.parquet", 2) == (texts, labels)
    assert not any("{" in text or "}" in text for text in texts)
    for name in ("train", "valid", "test"):
        messages = pd.read_parquet(folder / "spam" / f"{name}.parquet")
        assert list(messages.columns) == ["Text", "Label"] and set(messages.Label) == {0, 1}


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    texts = pyarrow.array([b"fine", b"\x80\x81"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: damaged"):
        read_texts(tmp_path / "t.parquet", 2)


def test_texts_and_labels_of_a_dictionary(tmp_path):
    columns = pyarrow.array(["x", "y"]).dictionary_encode(), pyarrow.array([1, 0]).dictionary_encode()
    table = pyarrow.Table.from_arrays(columns, names=("text", "label"))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet", 2) == (["x", "y"], [1, 0])


def test_what_to_do_about_a_damaged_file_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    path = make_sample(tmp_path / "sample-3") / "imdb" / "train.parquet"
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="delete it, and it is made again"):
        read_texts(path, 2)


def test_more_text_than_is_read_is_refused(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=["x" * 1000] * 3000, label=[0] * 3000)
    monkeypatch.setattr(data, "MAX_TEXT", 2_000_000)
    with pytest.raises(UserError, match=r"a\.parquet: holds more text than the 2000000 characters"):
        read_texts(path, 2)
    assert len(read_texts(path, 2, limit=300)[0]) == 300
    monkeypatch.setattr(data, "MAX_FILE", 100)
    with pytest.raises(UserError, match=r"a\.parquet: .* bytes are more than the 100"):
        read_texts(path, 2)


@pytest.mark.parametrize(("rows", "size"), [(37, 2), (33, 3), (5, 4)])
def test_processes_share_out_every_batch(rows, size, monkeypatch):
    x = torch.arange(rows)

    def read(batch_size):
        batches = Batches(rows, lambda i: (x[i],), batch_size)
        numbers = range(len(batches))
        return [batches.at(1, i, [3])[0] for i in numbers], list(map(batches.rows, numbers)), [*batches.in_order()]

    whole, sizes, _ = read(4 * size)
    monkeypatch.setattr(parallel, "size", lambda: size)
    parts, dealt = [], []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        part, same, own = read(4)
        assert same == sizes
        parts.append(part)
        dealt += [batch for (batch,) in own]
    for batch, of_each in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.cat(of_each).tolist() == batch.tolist()
    assert sorted(torch.cat(dealt).tolist()) == x.tolist()


def test_what_the_package_makes_is_told_by_its_source(tmp_path, monkeypatch):
    """Its files' bytes differ with the libraries that write them."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    before = data.data_digest("sample", "spam")
    path = next(tmp_path.glob("sample-*/spam/train.parquet"))
    pd.read_parquet(path).to_parquet(path, compression="gzip")
    assert data.data_digest("sample", "spam") == before
    folder = str(path.parent.parent)
    of_files = data.data_digest(folder, "spam")
    pd.read_parquet(path).to_parquet(path, compression=None)
    assert data.data_digest(folder, "spam") not in (before, of_files)


def test_data_that_was_changed_in_the_cache_is_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTLORA_DATA", raising=False)
    for part in ("train", "valid", "test"):
        (tmp_path / "data" / "spam").mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / "data" / "spam" / f"{part}.parquet", Text=["hi"], Label=[0])
    before = data.data_digest("auto", "spam")
    assert data.data_digest(str(tmp_path / "data"), "spam") == before
    parquet(tmp_path / "data" / "spam" / "train.parquet", Text=["hi"], Label=[1])
    assert data.data_digest("auto", "spam") != before
