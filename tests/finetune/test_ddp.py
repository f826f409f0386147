"""Two processes train as one does with the double batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import small

from fastlora.cli import main
from fastlora.finetune import gpt2

SMALL = Path(__file__).parent / "small.py"
RUN = ["train", "spam", "--data", "sample", "--model", "nano", "--epochs", "2", "--train-samples", "100"]


def test_two_processes_have_the_curve_of_the_double_batch(tmp_path, monkeypatch):
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SMALL)]
    command = [*two, *RUN, "--batch-size", "8", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("finished already") == 1, again.stderr[-3000:]
    taken = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert taken.returncode and taken.stderr.count("holds a finished run already; choose another --output") == 1
    assert taken.stderr.count("Traceback") == 1  # torchrun's own
    monkeypatch.setitem(gpt2.CONFIGS, "nano", gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0))
    assert main([*RUN, "--batch-size", "16", "--output", str(tmp_path / "one")]) == 0
    one, other = small.left(tmp_path / "one"), small.left(tmp_path / "two")
    assert other["report"]["processes"] == 2 and said.count("accuracy: valid") == 1
    assert other["report"]["batches"] == one["report"]["batches"] == {"train": 6, "valid": 5, "test": 10}
    assert len(one["history"]) == len(other["history"]) == 2
    for row, same in zip(one["history"], other["history"], strict=True):
        for key in ("train_loss", "valid_loss"):
            assert float(row[key]) == pytest.approx(float(same[key]), rel=1e-5)
        assert [row[key] for key in ("epoch", "step", "valid_accuracy")] == [
            same[key] for key in ("epoch", "step", "valid_accuracy")
        ]
    assert one["report"]["test_accuracy"] == other["report"]["test_accuracy"]
