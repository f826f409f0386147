"""Files whole or not there, and read when they are regular and not too large."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

import fastlora
from fastlora import files
from fastlora.errors import UserError


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_atomic_write_gives_the_rights_that_a_plain_write_gives(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_bytes(tmp_path / "atomic", b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: damaged"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse", "device"])
def test_what_is_no_json_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "sparse":
        path.touch()
        os.truncate(path, 20 << 30)
    else:
        {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(UserError, match=r"a\.json: cannot be read"):
        files.read_json(path)


def test_a_path_that_is_not_utf8_is_kept(tmp_path):
    name = os.fsdecode(b"d_\xff")
    files.write_json(tmp_path / "a.json", {"data": name})
    assert files.read_json(tmp_path / "a.json") == {"data": name}
    assert (tmp_path / "a.json").read_bytes().decode("utf-8")


def test_no_pickle_is_loaded():
    """Nothing of ours names pickle or torch.load but to forbid it."""
    for path in Path(fastlora.__file__).parent.rglob("*.py"):
        for word in ("torch.load", "import pickle", "pickle.load", "import marshal", "allow_pickle=True"):
            assert word not in path.read_text(), (path, word)
