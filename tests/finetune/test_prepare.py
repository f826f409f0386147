"""The raw collection's split equals the published one."""

import argparse
import errno
import gzip
import os
from pathlib import Path

import pandas as pd
import pytest

from fastlora.errors import UserError, WorkError
from fastlora.finetune import prepare
from fastlora.finetune.data import read_texts


def arguments(source, output):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return parser.parse_args([str(source), "--output", str(output)])


def test_split_equals_the_shared_files(data_dir, tmp_path, capsys):
    prepare.main(arguments(data_dir / "spam" / "SMSSpamCollection.tsv", tmp_path))
    total = pd.Series(dtype="int64")
    for name in ("train", "valid", "test"):
        ours = pd.read_parquet(tmp_path / "spam" / f"{name}.parquet")
        pd.testing.assert_frame_equal(ours, pd.read_parquet(data_dir / "spam" / f"{name}.parquet"))
        total = total.add(ours["Label"].value_counts(), fill_value=0)
    assert total.to_dict() == {0: 747, 1: 747}
    assert "train 1045, valid 149, test 300" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        prepare.main(arguments(data_dir / "spam" / "SMSSpamCollection.tsv", tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "0 spam and 0 ham"),
        (b"ham\thello\nnonsense\tx\n", "row 2"),
        (b"ham\thello\nspam\n", "row 2"),
        (b"ham\thello\n", "0 spam and 1 ham"),
        (b"spam\thello\n", "1 spam and 0 ham"),
        (b"ham\t\xff\xfe\n", "not a tab-separated"),
        (b"ham\thello\tthere\nspam\twin\n", "row 1"),
        (b"1\tham\thello\n2\tspam\twin\n", "row 1"),
        (b"ham\ta\nham\tb\nspam\tc\td\te\n", "not a tab-separated|row 3"),
        (b'ham\t"open\nspam\twin\n', "not a tab-separated"),
    ],
)
def test_wrong_sources(tmp_path, content, said):
    source = tmp_path / "raw.tsv"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError, match=said) as told:
        prepare.main(arguments(source, tmp_path / "out"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_unwritable_output(tmp_path):
    (tmp_path / "raw.tsv").write_text("ham\thello\nspam\twin\n")
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        prepare.main(arguments(tmp_path / "raw.tsv", tmp_path / "out"))


def test_output_under_a_file(tmp_path):
    (tmp_path / "raw.tsv").write_text("ham\thello\nspam\twin\n")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        prepare.main(arguments(tmp_path / "raw.tsv", tmp_path / "out"))


@pytest.mark.parametrize("name", ["raw.gz", "raw.zip", "raw.bz2", "raw.xz", "raw.tar", "raw.zst"])
def test_no_compression_is_guessed_from_a_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"ham\thello\nspam\twin\n")[:-5])
    with pytest.raises(UserError, match="not a tab-separated text file"):
        prepare.balanced_split(tmp_path / name)
    (tmp_path / name).write_text("ham\thello\nspam\twin\n")
    assert len(prepare.balanced_split(tmp_path / name)["test"]) > 0


def test_texts_that_look_like_numbers_or_like_nothing_stay_texts(tmp_path):
    (tmp_path / "raw.tsv").write_text("ham\t1\nham\tNA\nspam\tnull\nspam\t2.0\n")
    prepare.main(arguments(tmp_path / "raw.tsv", tmp_path))
    parts = [read_texts(path, 2, text="Text", label="Label")[0] for path in (tmp_path / "spam").iterdir()
             if len(pd.read_parquet(path))]
    assert sorted(text for part in parts for text in part) == ["1", "2.0", "NA", "null"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "20 GB"])
def test_a_source_that_is_no_file_of_messages(tmp_path, kind):
    source = tmp_path / "raw.tsv"
    if kind == "pipe":
        os.mkfifo(source)
    elif kind == "device":
        source.symlink_to("/dev/zero")
    elif kind == "folder":
        source.mkdir()
    else:
        source.touch()
        os.truncate(source, 20 << 30)
    with pytest.raises(UserError, match=r"raw\.tsv: cannot be read \(.*(regular|most)"):
        prepare.balanced_split(source)


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    (tmp_path / "raw.tsv").write_text("ham\thello\nspam\twin\n")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WorkError, match=r"the disk is full$"):
        prepare.main(arguments(tmp_path / "raw.tsv", tmp_path / "out"))


def test_an_output_that_is_not_utf8_and_one_without_a_name(tmp_path):
    (tmp_path / "raw.tsv").write_text("ham\thello\nspam\twin\n")
    prepare.main(arguments(tmp_path / "raw.tsv", tmp_path / "o\udcff"))
    assert (tmp_path / "o\udcff" / "spam" / "test.parquet").is_file()
    with pytest.raises(SystemExit):
        arguments(tmp_path / "raw.tsv", "")
