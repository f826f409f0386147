"""The command line: exit statuses, one line for a mistake, nothing heavy imported for --help."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from fastlora import cli
from fastlora.cli import main
from fastlora.errors import UserError, WorkError


def line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fastlora: "), error
    return error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required"),
        (["train", "mnist"], "invalid choice: 'mnist'"),
        (["train", "imdb"], "required: --output"),
        (["train", "imdb", "--output", "x", "--epochs", "0"], "--epochs: '0' is not a whole number from 1"),
        (["train", "imdb", "--output", "x", "--alpha", "0"], "--alpha: '0' is not a finite number above zero"),
        (["train", "imdb", "--output", "x", "--lr", "nan"], "--lr: 'nan' is not a finite number"),
        (
            ["train", "imdb", "--output", "x", "--seed", "4294967296"],
            "--seed: '4294967296' is not a whole number from 0 to 4294967295",
        ),
        (["train", "imdb", "--output", ""], "--output: a folder's name is empty"),
        (["prepare", "spam", "x", "--output", ""], "--output: a folder's name is empty"),
        (["predict", "", "text"], "the name of the run's folder is empty"),
        (["predict", "a" * 5000, "text"], "File name too long"),
        (["train", "\x1b[2J\x9b\u202e"], "'\\x1b[2J\\x9b\\u202e'"),
        (["train", "imdb", "--output", "x", "--train-samples", "1"], "--train-samples: '1'"),
        (["train", "imdb", "--output", "x", "--device", "tpu9"], "--device tpu9: no such kind of device"),
        (["train", "imdb", "--output", "x", "--device", "meta"], "only cpu and cuda"),
        (["predict"], "required"),
        (["predict", "nowhere", "text"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert message in line(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [UserError, WorkError])
def test_a_message_is_one_line_of_bounded_length_without_control_characters(monkeypatch, capsys, error):
    def fail(argv):
        raise error("/some/file: \x1b[2J\x1b]0;title\x07\n" + "x" * 10_000_000 + " and what to do")

    monkeypatch.setattr(cli, "_run", fail)
    assert main([]) == (2 if error is UserError else 1)
    said = line(capsys)
    assert said.startswith("fastlora: /some/file: \\x1b[2J\\x1b]0;title\\x07 xxx") and said.endswith("and what to do\n")
    assert said[:-1].isprintable() and len(said) < 520


def stand_in(monkeypatch, tmp_path):
    """A run of a program that finds "yes" in every text, and tells which texts it was given."""
    given = []
    (tmp_path / "report.json").write_text(json.dumps({"task": "imdb"}))
    monkeypatch.setattr(
        "fastlora.finetune.imdb.load_predictor",
        lambda run: lambda texts: given.extend(texts) or [("yes", 1.0)] * len(texts),
    )
    return given


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "é \ufffd \\x1b[2J"), ("ascii", "\\xe9 \\ufffd \\x1b[2J")])
def test_predict_takes_and_shows_any_text(monkeypatch, tmp_path, encoding, shown):
    given = stand_in(monkeypatch, tmp_path)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    assert main(["predict", str(tmp_path), "é \udcff \x1b[2J"]) == 0
    assert given == ["é \ufffd \x1b[2J"]
    assert out.buffer.getvalue().decode(encoding) == f"yes\t1.0000\t{shown}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
@pytest.mark.parametrize("unbuffered", [True, False])
def test_standard_output_on_a_full_disk(monkeypatch, tmp_path, capsys, unbuffered):
    stand_in(monkeypatch, tmp_path)
    with open("/dev/full", "wb", buffering=0) as full:
        raw = full if unbuffered else io.BufferedWriter(full)
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, write_through=unbuffered))
        assert main(["predict", str(tmp_path), "text"]) == 1
    assert line(capsys) == "fastlora: standard output cannot be written to (No space left on device)\n"


def test_data_that_is_not_there(tmp_path, capsys):
    train = ["train", "imdb", "--output", str(tmp_path / "run"), "--data"]
    for name, message in (
        (str(tmp_path / "none"), "no such folder"),
        ("", "--data '': no such folder"),
        ("a" * 5000, "no such folder"),
        ("~nobody-here/x", "'~nobody-here/x': the home folder"),
    ):
        assert main([*train, name]) == 2
        assert message in line(capsys)
    for name in ("donnéess", "\x9b2J"):
        assert main([*train, name]) == 2
        assert f"--data {name!r}: no such folder" in line(capsys)
    (tmp_path / "données").mkdir()
    assert main([*train, str(tmp_path / "données")]) == 2
    assert "données': lacks imdb/train.parquet" in line(capsys)
    assert not (tmp_path / "run" / "run.json").exists()


def test_cuda_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "imdb", "--output", str(tmp_path / "run"), "--device", "cuda"]) == 2
    assert "no CUDA device of that number" in line(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ("{}", "names no task"), ('{"task": "../x"}', "unknown task"), ("[1]", "names no task")],
)
def test_predict_refuses_a_strange_report(tmp_path, capsys, content, message):
    (tmp_path / "report.json").write_text(content)
    assert main(["predict", str(tmp_path), "text"]) == 2
    assert message in line(capsys)


def test_predict_wants_texts_or_standard_input(tmp_path, capsys, monkeypatch):
    (tmp_path / "report.json").write_text(json.dumps({"task": "imdb"}))
    assert main(["predict", str(tmp_path), "-", "more"]) == 2
    assert "not both" in line(capsys)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    assert main(["predict", str(tmp_path), "-"]) == 2
    assert "no text" in line(capsys)


def test_an_output_folder_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["train", "imdb", "--data", "sample", "--output", str(tmp_path / "file")]) == 2
    assert "cannot be used as output folder" in line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/run/x"), 1, "/run/x: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/run/x"), 1, "/run/x: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory; a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), 1, "out of memory; a smaller"),
        (ModuleNotFoundError("No module named 'tqdm'", name="tqdm"), 2, 'pip install "fastlora-kernels[train]"'),
        (ModuleNotFoundError("No module named 'peft.x'", name="peft.x"), 2, 'pip install "fastlora-kernels[peft]"'),
    ],
)
def test_what_goes_wrong_while_training(tmp_path, capsys, monkeypatch, error, status, message):
    def fail(args):
        raise error

    monkeypatch.setattr("fastlora.finetune.imdb.train", fail)
    assert main(["train", "imdb", "--output", str(tmp_path / "run")]) == status
    assert message in line(capsys)


def test_a_fault_of_our_own_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(args):
        raise ModuleNotFoundError("No module named 'fastlora.nothing'", name="fastlora.nothing")

    monkeypatch.setattr("fastlora.finetune.imdb.train", fail)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "imdb", "--output", str(tmp_path / "run")])


@pytest.mark.parametrize("when", [3, 6])
def test_a_full_disk_loses_nothing_and_the_run_goes_on(tmp_path, capsys, monkeypatch, when):
    """The `when`-th file that the run writes meets a full disk; afterwards there is room again."""
    train = [
        "train",
        "imdb",
        "--data",
        "sample",
        "--output",
        str(tmp_path / "run"),
        "--epochs",
        "2",
        "--train-samples",
        "100",
        "--test-samples",
        "50",
    ]
    count, real = 0, os.fsync

    def fsync(handle):
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(str(tmp_path / "run")) and not os.path.isdir(path):
            count += 1
            if count == when:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(train) == 1
    error = line_of(capsys)
    assert count >= when and ("the disk is full" in error or "No space left on device" in error)
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")]
    assert main([*train, "--resume"]) == 0
    assert main(["train", "imdb", "--data", "sample", "--output", str(tmp_path / "whole"), *train[6:]]) == 0
    ours, theirs = (tmp_path / folder / "adapter_model.safetensors" for folder in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def line_of(capsys):
    """The last line on standard error: progress bars and epochs' lines stand above it."""
    return capsys.readouterr().err.rstrip("\n").rsplit("\n", 1)[-1]


def test_missing_extras_are_named(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    from fastlora.finetune.sample import make_sample

    data = make_sample(tmp_path / "data")
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["train", "imdb", "--data", str(data), "--output", str(tmp_path / "run")]) == 2
    assert 'pyarrow is not installed: pip install "fastlora-kernels[train]"' in line(capsys)
    assert not (tmp_path / "run" / "run.json").exists()


def test_help_of_every_command(capsys):
    commands = (
        [],
        ["train"],
        ["predict"],
        ["prepare"],
        ["info"],
        ["train", "imdb"],
        ["train", "spam"],
        ["prepare", "spam"],
    )
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main([*command, "--help"])
        assert left.value.code == 0
        assert "usage: fastlora" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "GPU", "onepass", "split", "imdb", "not here"):
        assert word in out


def test_help_imports_no_torch_for_the_command_line_itself():
    # `fastlora/__init__.py` decides on its own whether to import torch: only what the command line adds is looked at.
    code = (
        "import sys, fastlora; before = set(sys.modules); from fastlora.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'pandas', 'pyarrow', 'matplotlib', 'transformers', 'peft', 'tiktoken', 'triton'}\n"
        "print('NEW', sorted((set(sys.modules) - before) & heavy | "
        "{m for m in set(sys.modules) - before if m.startswith('fastlora.finetune')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("NEW []"), done.stdout + done.stderr
