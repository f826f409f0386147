"""Files whole or not there; a run's folder held by one."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from fastlora.errors import UserError, WorkError
from fastlora.finetune import files


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


def test_a_new_run_then_resumed(tmp_path):
    folder = tmp_path / "deep" / "run"
    with files.run_folder(folder, {"seed": 0}, resume=False) as begun:
        assert not begun
    assert os.listdir(folder) == [files.SETTINGS]
    with files.run_folder(folder, {"seed": 0}, resume=True) as begun:
        assert begun


def test_resuming_nothing_starts(tmp_path):
    with files.run_folder(tmp_path, {"seed": 0}, resume=True) as begun:
        assert not begun


@pytest.mark.parametrize("name", files.RUN_FILES)
def test_a_folder_with_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"holds .* already"), files.run_folder(tmp_path, {}, resume=False):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_may_be_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with files.run_folder(tmp_path, {}, resume=False) as begun:
        assert not begun
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_with_other_settings_is_refused(tmp_path):
    with files.run_folder(tmp_path, {"lr": 1.0, "epochs": 2}, resume=False):
        pass
    with (pytest.raises(UserError, match=r"lr = 1\.0, not 0\.5"),
          files.run_folder(tmp_path, {"lr": 0.5, "epochs": 2}, resume=True)):
        pass


def test_resuming_a_strangers_files_is_refused(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="no run to resume"), files.run_folder(tmp_path, {}, resume=True):
        pass


def test_two_runs_in_one_folder(tmp_path):
    with files.run_folder(tmp_path, {}, resume=False):
        with (pytest.raises(UserError, match="another run is writing"),
              files.run_folder(tmp_path, {}, resume=True)):
            pass
        assert (tmp_path / ".lock").exists()
    with files.run_folder(tmp_path, {}, resume=True):
        pass


def test_what_a_killed_write_left_is_cleared(tmp_path):
    with files.run_folder(tmp_path, {}, resume=False):
        pass
    (tmp_path / ".report.json.x1.part").write_text("half")
    with files.run_folder(tmp_path, {}, resume=True):
        assert sorted(os.listdir(tmp_path)) == [".lock", files.SETTINGS]


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot be used as output folder"), files.run_folder(tmp_path / "a", {}, False):
        pass


def test_a_full_disk_is_failed_work():
    error = files.explain_os_error(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert isinstance(error, WorkError)
    assert "/x/y: the disk is full" in str(error)
