"""Folders that the environment names: homes that nobody knows, and users that have none."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from fastlora import env
from fastlora.errors import UserError


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without a passwd entry and without HOME; yields the folder of temporary files."""

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTLORA_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.expanded("~/x") == tmp_path / "x" and env.expanded(Path("a/~b")) == Path("a/~b")


@pytest.mark.parametrize("variable", ["FASTLORA_CACHE", "FASTLORA_DATA"])
def test_an_unknown_user_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "~nobody-here/x")
    with pytest.raises(UserError, match=r"~nobody-here/x.*not known"):
        env.cache_dir() if variable == "FASTLORA_CACHE" else env.data_dir()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users have numbers elsewhere")
def test_without_a_home_the_cache_is_a_folder_of_ones_own(homeless):
    folder = env.cache_dir()
    assert folder == homeless / f"fastlora-{os.getuid()}" == env.cache_dir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users have numbers elsewhere")
@pytest.mark.parametrize("planted", ["file", "link", "open to all", "another's"])
def test_without_a_home_anothers_folder_is_refused(homeless, monkeypatch, planted):
    folder = homeless / f"fastlora-{os.getuid()}"
    if planted == "file":
        folder.write_text("")
    elif planted == "link":
        folder.symlink_to(homeless)
    else:
        folder.mkdir()
        folder.chmod(0o777 if planted == "open to all" else 0o700)
    if planted == "another's":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        folder.rename(homeless / f"fastlora-{other}")
    with pytest.raises(UserError, match="name a folder by FASTLORA_CACHE"):
        env.cache_dir()
