"""Runs that were stopped, by a kill, a full disk or damage, and what `--resume` makes of them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

from fastlora.cli import main
from fastlora.finetune import gpt2, parallel
from fastlora.finetune.trainer import Trainer

HERE = Path(__file__).parent
RUN = ["train", "spam", "--data", "sample", "--model", "nano", "--epochs", "2", "--train-samples", "400"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(gpt2.CONFIGS, "nano", gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt2.CONFIGS, "nano", gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0))
        patch.setenv("FASTLORA_CACHE", str(folder.parent / "cache"))
        assert main([*RUN, "--output", str(folder)]) == 0
    return small.left(folder)


def campaign(kills, *more):
    command = [sys.executable, str(HERE / "killed.py"), str(kills), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same final bits each time" in done.stdout


def test_killed_and_resumed_ends_in_the_same_bits():
    campaign(2, "--seed", "1")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["spam", "imdb", "sweep", "distilbert"])
def test_killed_twenty_times(program):
    campaign(20, "--program", program)


class Stop(Exception):
    pass


def stopped_at(monkeypatch, save, folder):
    """Run until the checkpoint number `save` has been written, and stop there."""
    count = 0
    whole_save = Trainer.save

    def stop(self):
        nonlocal count
        whole_save(self)
        count += 1
        if count == save:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", stop)
        with pytest.raises(Stop):
            main([*RUN, "--output", str(folder)])


@pytest.mark.parametrize("save", [1, 2])  # within an epoch; at its end
def test_every_checkpoint_goes_on_to_the_same_bits(whole, monkeypatch, tmp_path, save):
    stopped_at(monkeypatch, save, tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()
    torch.manual_seed(999)  # what the new process has drawn does not matter
    assert main([*RUN, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert small.left(tmp_path / "run") == whole


def test_other_settings_and_damaged_files_are_refused_by_name(whole, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    stopped_at(monkeypatch, 1, run)

    def refused(said, *argv):
        capsys.readouterr()
        assert main([*RUN, "--output", str(run), *argv]) == 2
        told = capsys.readouterr().err
        line = [line for line in told.splitlines() if line.startswith("fastlora:")]
        assert len(line) == 1 and said in line[0] and "Traceback" not in told

    refused("go on with it by --resume")
    refused("started with lr = 0.0008, not 0.1", "--resume", "--lr", "0.1")
    refused("started with seed = 0, not 1", "--resume", "--seed", "1")
    for name in ("checkpoint.safetensors", "model.safetensors", "run.json"):
        good = (run / name).read_bytes()
        for bad in (good[: len(good) // 2], b""):
            (run / name).write_bytes(bad)
            refused(name, "--resume")
        (run / name).write_bytes(good)
    assert main([*RUN, "--output", str(run), "--resume"]) == 0
    assert small.left(run) == whole


def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path):
    """A limit on the size of files stands in for the disk: the system answers a write alike."""
    run = tmp_path / "run"
    command = [sys.executable, str(HERE / "small.py"), *RUN, "--output", str(run)]

    def limit():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=300)
    assert done.returncode == 1, done.stderr
    line = [line for line in done.stderr.splitlines() if line.startswith("fastlora:")]
    assert len(line) == 1 and "disk is full" in line[0] and "Traceback" not in done.stderr
    assert not list(run.glob("*.safetensors")) and not list(run.glob(".*.part"))
    assert main([*RUN, "--output", str(run), "--resume"]) == 0
    assert small.left(run) == whole


def test_two_runs_in_one_folder(tmp_path, capsys):
    from fastlora.finetune.run import run_folder

    with run_folder(tmp_path / "run", {"task": "spam"}, False):
        assert main([*RUN, "--output", str(tmp_path / "run"), "--resume"]) == 2
    assert "another run is writing" in capsys.readouterr().err


def test_a_checkpoint_of_other_processes(monkeypatch, tmp_path, capsys):
    stopped_at(monkeypatch, 1, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["processes"] == 1
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    monkeypatch.setattr(parallel, "add", lambda values: values)
    assert main([*RUN, "--output", str(tmp_path / "run"), "--resume"]) == 2
    assert "processes = 1, not 2" in capsys.readouterr().err
