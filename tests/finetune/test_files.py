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
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoints").mkdir()  # of an older version's run, too: never gone on from
    for resume in (False, True):
        with files.run_folder(tmp_path, {}, resume) as begun:
            assert not begun
        (tmp_path / files.SETTINGS).unlink()
    assert (tmp_path / "README.md").read_text() == "mine" and os.listdir(tmp_path / "checkpoints") == []


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
        assert (tmp_path / files.LOCK).exists()
    with files.run_folder(tmp_path, {}, resume=True):
        pass


def test_what_a_killed_write_left_is_cleared(tmp_path):
    with files.run_folder(tmp_path, {}, resume=False):
        pass
    (tmp_path / ".fastlora-report.json.x1.part").write_text("half")
    with files.run_folder(tmp_path, {}, resume=True):
        assert sorted(os.listdir(tmp_path)) == [files.LOCK, files.SETTINGS]


def test_the_users_own_files_stay(tmp_path):
    """Other programs' locks and downloads have names like ours had; so has a folder that ends like a temporary file."""
    (tmp_path / ".lock").write_text("mine")
    (tmp_path / ".movie.part").write_text("mine")
    (tmp_path / ".fastlora-x.part").mkdir()
    before = sorted(os.listdir(tmp_path))
    with files.run_folder(tmp_path, {}, resume=False):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*before, files.SETTINGS])
    assert (tmp_path / ".lock").read_text() == (tmp_path / ".movie.part").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_kept(tmp_path, kind):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    lock = folder / files.LOCK
    {"link": lambda: lock.symlink_to(victim), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(UserError, match="cannot be used as output folder"), files.run_folder(folder, {}, False):
        pass
    assert os.listdir(folder) == [files.LOCK] and victim.read_text() == "mine"


def test_a_dangling_link_is_not_replaced(tmp_path):
    (tmp_path / files.REPORT).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"report\.json"), files.run_folder(tmp_path, {}, resume=False):
        pass
    assert (tmp_path / files.REPORT).is_symlink()


def test_a_run_that_fails_late_is_not_taken_for_the_next(tmp_path):
    """Checkpoints belong to run.json: it stays with them, so that other settings do not go on from them."""
    with pytest.raises(OSError, match="late"), files.run_folder(tmp_path, {"seed": 1}, resume=False):
        (tmp_path / files.CHECKPOINT).touch()
        raise OSError("late")
    for resume, said in ((False, "--resume"), (True, "seed = 1, not 2")):
        with pytest.raises(UserError, match=said), files.run_folder(tmp_path, {"seed": 2}, resume):
            pass


def test_a_path_that_is_not_utf8_is_kept(tmp_path):
    name = os.fsdecode(b"d_\xff")
    files.write_json(tmp_path / "a.json", {"data": name})
    assert files.read_json(tmp_path / "a.json") == {"data": name}
    assert (tmp_path / "a.json").read_bytes().decode("utf-8")


def test_strange_settings_are_shown_escaped(tmp_path):
    (tmp_path / files.SETTINGS).write_text('{"data": "a\\u001b[2J\\nb", "x\\ny": 1}')
    with pytest.raises(UserError, match="started with") as told, files.run_folder(tmp_path, {"data": "b"}, True):
        pass
    assert str(told.value).isprintable()


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot be used as output folder"), files.run_folder(tmp_path / "a", {}, False):
        pass


def test_an_output_whose_name_is_not_utf8_is_refused_before_the_work(tmp_path):
    folder = tmp_path / os.fsdecode(b"o_\xff")
    with pytest.raises(UserError, match="not UTF-8"), files.run_folder(folder, {}, False):
        pass
    assert not folder.exists()


def test_a_full_disk_is_failed_work():
    error = files.explain_os_error(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert isinstance(error, WorkError)
    assert "/x/y: the disk is full" in str(error)
