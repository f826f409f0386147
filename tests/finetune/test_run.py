"""A run's folder, held by one process; its report."""

from __future__ import annotations

import os

import pandas as pd
import pytest

from fastlora.errors import UserError
from fastlora.finetune import run as runs


def test_a_new_run_then_resumed(tmp_path):
    folder = tmp_path / "deep" / "run"
    with runs.run_folder(folder, {"seed": 0}, resume=False) as unfinished:
        assert unfinished
    assert sorted(os.listdir(folder)) == [runs.LOCK, runs.SETTINGS]
    with runs.run_folder(folder, {"seed": 0}, resume=True) as unfinished:
        assert unfinished
        (folder / runs.REPORT).touch()
    with runs.run_folder(folder, {"seed": 0}, resume=True) as unfinished:
        assert not unfinished


def test_resuming_nothing_starts(tmp_path):
    with runs.run_folder(tmp_path, {"seed": 0}, resume=True) as unfinished:
        assert unfinished


@pytest.mark.parametrize("name", runs.RUN_FILES)
def test_a_folder_with_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"holds .* already"), runs.run_folder(tmp_path, {}, resume=False):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_a_reason_is_said_though_the_other_processes_are_gone(tmp_path, monkeypatch):
    def gone(values):
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(runs.parallel, "add", gone)
    (tmp_path / runs.SETTINGS).write_text("mine")
    with pytest.raises(UserError, match=r"holds .* already"), runs.run_folder(tmp_path, {}, resume=False):
        pass


def test_other_files_may_be_there(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for resume in (False, True):
        with runs.run_folder(tmp_path, {}, resume) as unfinished:
            assert unfinished
        (tmp_path / runs.SETTINGS).unlink()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_resuming_with_other_settings_is_refused(tmp_path):
    with runs.run_folder(tmp_path, {"lr": 1.0, "epochs": 2}, resume=False):
        pass
    with (
        pytest.raises(UserError, match=r"lr = 1\.0, not 0\.5"),
        runs.run_folder(tmp_path, {"lr": 0.5, "epochs": 2}, resume=True),
    ):
        pass


def test_resuming_with_other_data_is_refused(tmp_path):
    for digest in ("one", "one"):
        with runs.run_folder(tmp_path, {"data_sha256": digest}, resume=True):
            pass
    with (
        pytest.raises(UserError, match=r"data_sha256 = 'one', not 'other'"),
        runs.run_folder(tmp_path, {"data_sha256": "other"}, resume=True),
    ):
        pass


def test_resuming_a_strangers_files_is_refused(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="no run to resume"), runs.run_folder(tmp_path, {}, resume=True):
        pass


def test_two_runs_in_one_folder(tmp_path):
    with runs.run_folder(tmp_path, {}, resume=False):
        with pytest.raises(UserError, match="another run is writing"), runs.run_folder(tmp_path, {}, resume=True):
            pass
        assert (tmp_path / runs.LOCK).exists()
    with runs.run_folder(tmp_path, {}, resume=True):
        pass


def test_what_a_killed_write_left_is_cleared(tmp_path):
    with runs.run_folder(tmp_path, {}, resume=False):
        pass
    (tmp_path / ".fastlora-report.json.x1.part").write_text("half")
    with runs.run_folder(tmp_path, {}, resume=True):
        assert sorted(os.listdir(tmp_path)) == [runs.LOCK, runs.SETTINGS]


def test_the_users_own_files_stay(tmp_path):
    """Other programs' locks and downloads have names like ours had; so has a folder that ends like a temporary file."""
    (tmp_path / ".lock").write_text("mine")
    (tmp_path / ".movie.part").write_text("mine")
    (tmp_path / ".fastlora-x.part").mkdir()
    before = sorted(os.listdir(tmp_path))
    with runs.run_folder(tmp_path, {}, resume=False):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*before, runs.LOCK, runs.SETTINGS])
    assert (tmp_path / ".lock").read_text() == (tmp_path / ".movie.part").read_text() == "mine"


def test_a_run_that_fails_late_is_not_taken_for_the_next(tmp_path):
    """Checkpoints belong to run.json: it stays with them, so that other settings do not go on from them."""
    with pytest.raises(OSError, match="late"), runs.run_folder(tmp_path, {"seed": 1}, resume=False):
        (tmp_path / runs.CHECKPOINT).touch()
        raise OSError("late")
    for resume, said in ((False, "--resume"), (True, "seed = 1, not 2")):
        with pytest.raises(UserError, match=said), runs.run_folder(tmp_path, {"seed": 2}, resume):
            pass


def test_strange_settings_are_shown_escaped(tmp_path):
    (tmp_path / runs.SETTINGS).write_text('{"data": "a\\u001b[2J\\nb", "x\\ny": 1}')
    with pytest.raises(UserError, match="started with") as told, runs.run_folder(tmp_path, {"data": "b"}, True):
        pass
    assert str(told.value).isprintable()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("members", [0, 1, 4, 64])
def test_the_picture_of_a_sweep_of_any_size(tmp_path, members):
    """More runs than a legend has room for are drawn without one, and matplotlib has nothing to warn of."""
    numbers = {f"{part}_{what}": [0.5, 0.6] for part in ("train", "valid") for what in ("loss", "accuracy")}
    one = pd.DataFrame({"epoch": [1.0, 2.0], **numbers})
    history = pd.concat([one.assign(run=f"lr={i} rank=2 alpha=16") for i in range(members)] or [one])
    runs.plot_history(tmp_path / "curves.png", history, "a sweep")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
