"""The raw collection's split equals the published one."""

import argparse
import os

import pandas as pd
import pytest

from fastlora.errors import UserError
from fastlora.finetune import prepare


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
