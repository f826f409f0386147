"""Texts read, cut into words, numbered and batched."""

from __future__ import annotations

import os

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch

from fastlora.errors import UserError, WorkError
from fastlora.finetune import data
from fastlora.finetune.batches import Batches
from fastlora.finetune.data import TextDataset, collate_batch, random_split, read_texts
from fastlora.finetune.sample import make_sample
from fastlora.finetune.text_classifier import TextClassifier
from fastlora.finetune.vocabulary import PAD, UNKNOWN, Vocabulary, tokenise

TEXTS = ["a good film", "bad", "", "a film a film a good good day", "what"]


@pytest.fixture
def dataset():
    words = [tokenise(text) for text in TEXTS]
    return TextDataset(words, [1, 0, 1, 1, 0], Vocabulary.of(words, size=4, least=1))


def parquet(path, **columns):
    pd.DataFrame(columns).to_parquet(path, index=False)
    return path


def test_tokenise():
    assert tokenise("It's <br /><br />GREAT! Isn't it, #39;really#39; 10/10?") == [
        "it's", "great", "!", "isn't", "it", "really", "10", "10", "?"]


def test_vocabulary_orders_by_frequency_then_alphabet_and_comes_back(tmp_path):
    vocabulary = Vocabulary.of([["b", "a", "c"], ["c", "d"]], size=3, least=1)
    assert vocabulary.words == ["<pad>", "<unk>", "c", "a", "b"]
    assert vocabulary.encode(["c", "d", "b"]).tolist() == [2, UNKNOWN, 4]
    assert vocabulary.encode([]).tolist() == [UNKNOWN]
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json").words == vocabulary.words
    assert len(Vocabulary.of([["b", "a", "a"]], size=9, least=2)) == 3


@pytest.mark.parametrize("content", ["{}", "[1]", '["a", "a"]', '["<pad>"]', "no"])
def test_a_damaged_vocabulary_is_named(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(UserError, match=r"v\.json: damaged"):
        Vocabulary.load(tmp_path / "v.json")


def test_items_iteration_and_batches_agree(dataset):
    items = [dataset[i] for i in range(len(dataset))]
    assert [label for label, _ in items] == [1, 0, 1, 1, 0]
    for (label, ids), (again, same) in zip(items, dataset, strict=True):
        assert label == again and torch.equal(ids, same)
    assert torch.equal(dataset[-1][1], items[-1][1])
    rows = torch.tensor([3, 0, 2])
    for pad_to in (1, 16):
        ours = dataset.batch(rows, pad_to)
        theirs = collate_batch([items[i] for i in rows], pad_to)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
    assert dataset.words(rows) == 8 + 3 + 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_padding_never_enters_the_mean(dataset):
    torch.manual_seed(0)
    model = TextClassifier(torch.randn(6, 100), classes=2)
    items = [dataset[i] for i in range(len(dataset))]
    ids, offsets, _ = collate_batch(items, pad_to=64)
    assert len(ids) == 64 and (ids[offsets[-1]:] == PAD).all()
    with torch.no_grad():
        logits = model(ids, offsets)
        means = torch.stack([model.embedding.weight[own.long()].mean(0) for _, own in items])
        one_by_one = model.fc2(torch.relu(model.fc1(means)))
        model.embedding.weight[PAD] = 1e6
        assert torch.equal(model(ids, offsets), logits)
    assert logits.shape == (5, 2)
    torch.testing.assert_close(logits, one_by_one)


def test_batches_cover_each_row_once_in_an_order_of_seed_and_epoch():
    batches = Batches(10, lambda rows: (rows, rows), 4, seed=1)
    assert len(batches) == 3
    first, again, other = ([b[0].tolist() for b in batches.epoch(n)] for n in (0, 0, 1))
    assert first == again != other
    assert sorted(row for batch in first for row in batch) == list(range(10))
    assert [b[0].tolist() for b in batches.epoch(0, start=1)] == first[1:]
    assert [b[0].tolist() for b in Batches(10, lambda rows: (rows, rows), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(Batches(10, lambda rows: (rows, rows), 4, drop_last=True)) == 2


def test_random_split():
    train, valid = random_split(25_000, seed=3)
    assert (len(train), len(valid)) == (23_750, 1_250)
    assert sorted(torch.cat([train, valid]).tolist()) == list(range(25_000))
    assert torch.equal(random_split(25_000, seed=3)[1], valid)
    assert not torch.equal(random_split(25_000, seed=4)[1], valid)
    assert [len(part) for part in random_split(2, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        random_split(1, seed=0)


def test_read_texts_takes_the_first_rows(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["x", "y", "z"], label=[0, 1, 0])
    assert read_texts(path, 2) == (["x", "y", "z"], [0, 1, 0])
    assert read_texts(path, 2, limit=2) == (["x", "y"], [0, 1])


@pytest.mark.parametrize(("columns", "message"), [
    ({"text": ["x"], "lable": [0]}, "no column 'label'; it has 'text', 'lable'"),
    ({"label": [0]}, "no column 'text'"),
    ({"text": ["x", "y"], "label": [0, 2]}, "row 1 has the unknown label 2; known are 0 to 1"),
    ({"text": ["x"], "label": [-1]}, "unknown label -1"),
    ({"text": ["x"], "label": ["pos"]}, "column 'label' holds '.*string', not whole numbers"),
    ({"text": ["x"], "label": [0.5]}, "column 'label' holds 'double', not whole numbers"),
    ({"text": ["x", None], "label": [0, 1]}, "row 1 has no text"),
    ({"text": [7], "label": [0]}, "column 'text' holds 'int64', not texts"),
    ({"text": [], "label": []}, "holds no rows"),
])
def test_wrong_tables_are_named(tmp_path, columns, message):
    with pytest.raises(UserError, match=message) as caught:
        read_texts(parquet(tmp_path / "a.parquet", **columns), 2)
    assert "a.parquet" in str(caught.value) and "\n" not in str(caught.value)


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
    with pytest.raises(UserError, match=r"t\.parquet: damaged, a text is not UTF-8"):
        read_texts(tmp_path / "t.parquet", 2)


def test_a_column_name_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"text": ["fine"], "label": [0]}).to_parquet(path)
    path.write_bytes(path.read_bytes().replace(b"label", b"\xe5abel"))
    with pytest.raises(UserError, match=r"t\.parquet: damaged, a column's name is not UTF-8"):
        read_texts(path, 2)


def table(path, texts, labels, names=("text", "label")):
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(texts), labels], names=names), path)
    return path


@pytest.mark.parametrize(("labels", "names", "message"), [
    (pyarrow.array([2**62], pyarrow.timestamp("us")), ("text", "label"), "holds 'timestamp.*', not whole numbers"),
    (pyarrow.array([0], pyarrow.timestamp("s", tz="No/Where")), ("text", "label"), "not whole numbers"),
    (pyarrow.array(["x"]), ("text", "text"), "two columns 'text'"),
    (pyarrow.array([0]), ("text", "a\n\x1b[2J" + "x" * 100_000), r"it has 'text', 'a\\n\\x1b\[2Jx+\.\.\."),
    (pyarrow.array([None], pyarrow.int64()), ("text", "label"), "row 0 has the unknown label None"),
])
def test_strange_columns_are_named_in_one_short_line(tmp_path, labels, names, message):
    with pytest.raises(UserError, match=message) as caught:
        read_texts(table(tmp_path / "a.parquet", ["x"], labels, names), 2)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_texts_and_labels_of_a_dictionary(tmp_path):
    columns = pyarrow.array(["x", "y"]).dictionary_encode(), pyarrow.array([1, 0]).dictionary_encode()
    assert read_texts(table(tmp_path / "a.parquet", *columns), 2) == (["x", "y"], [1, 0])


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.parquet"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"a\.parquet: .*not a regular file"):
        read_texts(path, 2)


def test_a_name_that_is_not_utf8(tmp_path):
    assert read_texts(parquet(tmp_path / "a.parquet", text=["x"], label=[0]).rename(tmp_path / "\udcff"), 2)[0] == ["x"]


def bomb(path, rows=3_000_000):
    """Some kB that stand for `rows` texts of 1,000 letters."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), rows), ["x" * 1000])
    schema = pyarrow.schema({"text": texts.type, "label": pyarrow.int64()})
    labels = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int64()), rows)
    with pyarrow.parquet.ParquetWriter(path, schema, store_schema=False, compression="zstd") as file:
        file.write_table(pyarrow.table([texts, labels], schema=schema))
    return path


def test_a_small_file_of_much_text_is_refused_by_name_and_read_only_as_far_as_asked(tmp_path, monkeypatch):
    path, asked = bomb(tmp_path / "a.parquet"), []
    assert path.stat().st_size < 1_000_000
    pieces = data._pieces
    monkeypatch.setattr(data, "_pieces", lambda *a: (asked.append(len(piece[0])) or piece for piece in pieces(*a)))
    assert len(read_texts(path, 2, limit=300)[0]) == 300 == sum(asked)
    monkeypatch.setattr(data, "MAX_TEXT", 100_000_000)
    with pytest.raises(UserError, match=r"a\.parquet: holds more text than the 100000000 characters"):
        read_texts(path, 2)
    monkeypatch.setattr(data, "MAX_ROWS", 1_000_000)
    with pytest.raises(UserError, match=r"a\.parquet: says that it holds 3000000 rows"):
        read_texts(path, 2)
    assert len(read_texts(path, 2, limit=1)[0]) == 1


def test_a_claim_of_much_is_refused_before_it_is_made_room_for(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=["x" * 1000] * 10, label=[0] * 10)
    monkeypatch.setattr(data, "MAX_TEXT", 500)
    with pytest.raises(UserError, match=r"a\.parquet: says that it holds 10 rows of together"):
        read_texts(path, 2, limit=2)


def test_too_little_memory_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise pyarrow.ArrowMemoryError("malloc of size 4000000000 failed")

    monkeypatch.setattr(data, "_pieces", full)
    with pytest.raises(WorkError, match=r"a\.parquet: there is not memory enough"):
        read_texts(tmp_path / "a.parquet", 2)


def test_what_to_do_about_a_damaged_file_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    path = make_sample(tmp_path / "sample-1") / "imdb" / "train.parquet"
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="delete it, and it is made again"):
        read_texts(path, 2)
