"""The encoding, the data set and its hostile inputs."""

import os

import pandas as pd
import pytest
import torch

from fastlora.errors import UserError
from fastlora.finetune import spam_data

tiktoken = pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def encoding(data_dir):
    return spam_data.gpt2_encoding(data_dir)


@pytest.fixture
def bytes_encoding():
    """A vocabulary of single bytes: enough where the ids do not matter, and in need of no file."""
    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})


def frame(path, labels, texts):
    pd.DataFrame({"Label": labels, "Text": texts}).to_parquet(path)
    return path


def test_encoding_is_gpt2s(encoding):
    assert encoding.n_vocab == 50257
    assert encoding.encode("Hello world") == [15496, 995]
    assert encoding.encode("£1.50 naïve 🙂\n\n  x")[:3] == [14988, 16, 13]
    text = "£1.50 naïve 🙂\n\n  Ünï don't <|endoftext|>"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_real_shapes(encoding, data_dir):
    train = spam_data.SpamDataset(data_dir / "spam" / "train.parquet", encoding)
    valid = spam_data.SpamDataset(data_dir / "spam" / "valid.parquet", encoding, train.length)
    test = spam_data.SpamDataset(data_dir / "spam" / "test.parquet", encoding, train.length)
    assert [data.inputs.shape for data in (train, valid, test)] == [(1045, 120), (149, 120), (300, 120)]
    assert (len(train) // 8, -(-len(valid) // 8), -(-len(test) // 8)) == (130, 19, 38)
    assert train.labels.bincount().tolist() == [528, 517]
    first = train.inputs[0]
    words = first[first != spam_data.PAD]
    assert encoding.decode(words.tolist()) == "Dude how do you like the buff wind."
    assert (first[len(words):] == spam_data.PAD).all()


def test_vocabulary_of_another_checksum(data_dir, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "encoder.json").write_bytes((data_dir / "gpt2" / "encoder.json").read_bytes())
    with pytest.raises(UserError, match=r"vocab\.bpe"):
        spam_data.gpt2_encoding(tmp_path)
    whole = (data_dir / "gpt2" / "vocab.bpe").read_bytes()
    (folder / "vocab.bpe").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"vocab\.bpe: sha256") as told:
        spam_data.gpt2_encoding(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse"])
@pytest.mark.parametrize("name", spam_data.CHECKSUMS)
def test_what_is_no_vocabulary_file_is_refused_at_once(tmp_path, name, kind):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for other in spam_data.CHECKSUMS:
        (folder / other).touch()
    if kind == "sparse":
        os.truncate(folder / name, 20 << 30)
    else:
        (folder / name).unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir}[kind](folder / name)
    with pytest.raises(UserError, match="gpt2"):
        spam_data.gpt2_encoding(tmp_path)


def test_no_vocabulary_and_no_network(tmp_path, monkeypatch):
    def refuse(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match=r"no encoder\.json and vocab\.bpe"):
        spam_data.gpt2_encoding(tmp_path)


def test_pad_cut_and_specials_as_text(bytes_encoding):
    rows = spam_data.encode(["abc", "", "abcdef"], bytes_encoding, 4)
    assert rows.tolist() == [[97, 98, 99, 50256], [50256] * 4, [97, 98, 99, 100]]
    assert spam_data.encode(["", ""], bytes_encoding).shape == (2, 1)
    assert spam_data.encode(["<|endoftext|>"], bytes_encoding).shape == (1, 13)


def test_limit_takes_the_first_rows(bytes_encoding, tmp_path):
    path = frame(tmp_path / "t.parquet", [0, 1, 1], ["a", "bb", "a long one"])
    data = spam_data.SpamDataset(path, bytes_encoding, limit=2)
    assert len(data) == 2 and data.length == 2 and data.labels.tolist() == [0, 1]
    x, y = data[torch.tensor([1])]
    assert x.tolist() == [[98, 98]] and y.tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "texts", "said"),
    [([], [], "holds no rows"), ([2], ["x"], "row 0"), ([0], [None], "Text"), (["spam"], ["x"], "Label")],
)
def test_wrong_rows(tmp_path, bytes_encoding, labels, texts, said):
    with pytest.raises(UserError, match=said):
        spam_data.SpamDataset(frame(tmp_path / "t.parquet", labels, texts), bytes_encoding)


def test_wrong_files(tmp_path, bytes_encoding):
    def refused(path, said):
        with pytest.raises(UserError, match=said) as told:
            spam_data.SpamDataset(path, bytes_encoding)
        assert str(path) in str(told.value) and "\n" not in str(told.value)

    refused(tmp_path / "t.parquet", "no such file")
    pd.DataFrame({"Label": [0]}).to_parquet(tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "no column 'Text'")
    for content in (b"", b"PAR1 nonsense PAR1", (tmp_path / "t.parquet").read_bytes()[:-9]):
        (tmp_path / "cut.parquet").write_bytes(content)
        refused(tmp_path / "cut.parquet", "not a parquet file")
