"""The raw collection's split equals the published one."""

import argparse

import pandas as pd
import pytest

from fastlora.errors import UserError
from fastlora.finetune import homes
from fastlora.finetune.data import read_texts


def arguments(source, output):
    parser = argparse.ArgumentParser()
    homes.add_arguments(parser)
    return parser.parse_args([str(source), "--output", str(output)])


def test_split_equals_the_shared_files(data_dir, tmp_path, capsys):
    homes.main(arguments(data_dir / "spam" / "SMSSpamCollection.tsv", tmp_path))
    total = pd.Series(dtype="int64")
    for name in ("train", "valid", "test"):
        ours = pd.read_parquet(tmp_path / "spam" / f"{name}.parquet")
        pd.testing.assert_frame_equal(ours, pd.read_parquet(data_dir / "spam" / f"{name}.parquet"))
        total = total.add(ours["Label"].value_counts(), fill_value=0)
    assert total.to_dict() == {0: 747, 1: 747}
    assert "train 1045, valid 149, test 300" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        homes.main(arguments(data_dir / "spam" / "SMSSpamCollection.tsv", tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
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
        homes.main(arguments(source, tmp_path / "out"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_texts_that_look_like_numbers_or_like_nothing_stay_texts(tmp_path):
    (tmp_path / "raw.tsv").write_text("ham\t1\nham\tNA\nspam\tnull\nspam\t2.0\n")
    homes.main(arguments(tmp_path / "raw.tsv", tmp_path))
    parts = [
        read_texts(path, 2, columns=("Text", "Label"))[0]
        for path in (tmp_path / "spam").iterdir()
        if len(pd.read_parquet(path))
    ]
    assert sorted(text for part in parts for text in part) == ["1", "2.0", "NA", "null"]
