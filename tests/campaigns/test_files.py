"""What stands in a file's place and is none: refused at once, by name, by every loader."""

from __future__ import annotations

import os
import signal

import pytest

from campaigns.fuzz_loaders import CORPUS
from campaigns.loaders import LOADERS
from fastlora.errors import UserError

KINDS = ("pipe", "folder", "empty and endless", "endless", "device")


@pytest.fixture(autouse=True)
def _no_waiting():
    """A pipe that is waited for ends the test, not the tests."""

    def waited(*_):
        raise AssertionError("waited for ten seconds")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put_in_its_place(kind: str, path) -> None:
    if kind == "endless":
        os.truncate(path, 20 << 30)  # the good file, then a hole
        return
    path.unlink()
    if kind == "empty and endless":
        path.touch()
        os.truncate(path, 20 << 30)
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_file_is_refused_at_once(tmp_path, name, kind):
    loader = LOADERS[name]
    path = loader.make(tmp_path)
    put_in_its_place(kind, path)
    with pytest.raises(UserError) as told:
        loader.load(tmp_path)
    said = str(told.value)
    assert path.name in said and len(said) < 1000 and said.isprintable()


@pytest.mark.parametrize(("name", "why"), [("statistics", "damaged"), ("negative", "holds no rows")])
def test_what_coverage_guided_fuzzing_found_is_refused(tmp_path, name, why):
    """Column statistics at which pyarrow raises in C++, where nobody catches it; a negative number of rows."""
    path = LOADERS["parquet"].make(tmp_path)
    path.write_bytes((CORPUS / "parquet" / name).read_bytes())
    with pytest.raises(UserError, match=f"{path.name}: {why}"):
        LOADERS["parquet"].load(tmp_path)
