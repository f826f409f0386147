"""`--sweep`: several adapters in one run are what they would be alone; one that diverges touches no other."""

from __future__ import annotations

import csv
import json

import pytest
import small
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.cli import main
from fastlora.errors import UserError, WorkError
from fastlora.finetune import gpt2, tune
from fastlora.finetune.data import Batches
from fastlora.finetune.step import Settings
from fastlora.finetune.trainer import Member, Trainer

FEW = ["--data", "sample", "--epochs", "2", "--device", "cpu", "--train-samples", "300", "--test-samples", "100"]
IMDB = ["train", "imdb", *FEW]
SWEEP = "lr=0.3,1 rank=2,8"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, cache):
    monkeypatch.setenv("FASTLORA_CACHE", str(cache))
    monkeypatch.setitem(gpt2.CONFIGS, "nano", gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0))


@pytest.fixture(scope="module")
def swept(cache, tmp_path_factory):
    """A sweep of four."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE", str(cache))
        assert main([*IMDB, "--sweep", SWEEP, "--output", str(folder)]) == 0
    return folder


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_sweep_reports_each_run_and_the_best(swept, capsys):
    told = report(swept)
    assert [name for name in small.FIELDS if name not in told] == []
    assert [(run["lr"], run["rank"]) for run in told["runs"]] == [(0.3, 2), (0.3, 8), (1.0, 2), (1.0, 8)]
    assert told["best"] in [run["name"] for run in told["runs"]] and len(told["runs"]) == 4
    (best,) = (run for run in told["runs"] if run["name"] == told["best"])
    assert best["valid_accuracy"] == max(run["valid_accuracy"] for run in told["runs"]) == told["valid_accuracy"]
    assert best["test_accuracy"] == told["test_accuracy"] and best["rank"] == told["rank"]
    assert told["adapter_parameters"] == 228 * told["rank"] and told["full_layer_parameters"] == 12_800
    assert told["trainable_parameters"] == told["adapter_parameters"] + 258
    with open(swept / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["run"] for row in rows} == {run["name"] for run in told["runs"]}
    assert (swept / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["predict", str(swept), "a wonderful superb film", "what an awful boring mess"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["positive", "negative"]


def test_the_best_is_left_as_a_plain_run_leaves_its_own(swept):
    name = report(swept)["best"].replace(" ", ",")
    best, own = (load_file(folder / "adapter_model.safetensors") for folder in (swept, swept / "adapters" / name))
    assert len(list((swept / "adapters").iterdir())) == 4
    assert set(best) == set(own) and all(torch.equal(best[key], own[key]) for key in best)


@pytest.mark.parametrize("program", ["imdb", "spam"])
def test_each_member_learns_what_it_learns_alone(program, tmp_path):
    settings = [("--lr", "0.3" if program == "imdb" else "0.003"), ("--rank", "8"), ("--seed", "1")]
    sweep = " ".join(
        f"{flag[2:]}={value},{other}" for (flag, value), other in zip(settings, ("0.01", "2", "0"), strict=True)
    )
    run = ["train", program, *FEW]
    assert main([*run, "--sweep", sweep, "--output", str(tmp_path / "sweep")]) == 0
    assert main([*run, *(part for pair in settings for part in pair), "--output", str(tmp_path / "alone")]) == 0
    first, alone = report(tmp_path / "sweep")["runs"][0], report(tmp_path / "alone")
    assert abs(first["test_accuracy"] - alone["test_accuracy"]) <= 0.01
    with open(tmp_path / "sweep" / "history.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == first["name"]]
    for row, other in zip(rows, small.left(tmp_path / "alone")["history"], strict=True):
        assert row["step"] == other["step"] and row["learning_rate"] == other["learning_rate"]
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-3)


class Stop(Exception):
    pass


@pytest.mark.parametrize("save", [2, 3])
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(swept, tmp_path, monkeypatch, save):
    count, whole = 0, Trainer.save

    def stop(self):
        nonlocal count
        whole(self)
        count += len(self.members) > 1 or self.settings.checkpoint is None
        if count == 3 + save - 1:  # three of the pre-training
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", stop)
        with pytest.raises(Stop):
            main([*IMDB, "--sweep", SWEEP, "--output", str(tmp_path / "run")])
    assert main([*IMDB, "--sweep", "lr=0.3,1", "--output", str(tmp_path / "run"), "--resume"]) == 2
    assert main([*IMDB, "--sweep", SWEEP, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert small.left(tmp_path / "run") == small.left(swept)
    for folder in (swept / "adapters").iterdir():
        ours = tmp_path / "run" / "adapters" / folder.name
        assert small._tensors(ours / "adapter_model.safetensors") == small._tensors(
            folder / "adapter_model.safetensors"
        )


@pytest.mark.parametrize(("sweep", "said"), [
    ("", "it is empty"),
    ("lr", "'lr' is not one of lr, rank, alpha, seed"),
    ("batch-size=8,16", "'batch-size=8,16' is not one of lr, rank, alpha, seed"),
    ("lr=0.1,", "lr: '' is not a finite number"),
    ("rank=2,0", "rank: '0' is not a whole number from 1"),
    ("lr=1,1.0", "lr is given twice, or one of its values"),
    ("lr=1 lr=2", "lr is given twice"),
    ("alpha=1e300", "alpha: '1e300' is not a finite number above zero that float32 has"),
])  # fmt: skip
def test_a_mistake_is_one_line(sweep, said, tmp_path, capsys):
    assert main([*IMDB, "--sweep", sweep, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_sweep_of_one_and_one_under_accumulation(tmp_path):
    assert main([*IMDB, "--sweep", "rank=3", "--accumulate", "2", "--output", str(tmp_path / "run")]) == 0
    assert [run["rank"] for run in report(tmp_path / "run")["runs"]] == [3]


def test_what_a_sweep_does_not_go_with(tmp_path, capsys):
    assert main([*IMDB, "--sweep", "lr=1", "--impl", "eager", "--output", str(tmp_path / "run")]) == 2
    assert "--sweep goes with --impl fused" in capsys.readouterr().err
    assert main([*IMDB, "--sweep", "lr=1", "--lr", "1", "--output", str(tmp_path / "run")]) == 2
    assert "--lr is given beside --sweep" in capsys.readouterr().err


ROWS = 120
X = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :2].argmax(1)


def trainer(lrs, path=None, epochs=3, device="cpu", graph=False):
    """A sweep of rates over one small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).to(device)
    members = [
        Member(f"run{i}", {"lr": lr, "rank": 2 + i, "alpha": 4.0, "seed": i})
        for i, lr in enumerate(lrs)
        if lr is not None
    ]
    tune.adapt(model, members, "fused", ["0"], heads=["2"])
    optimiser = torch.optim.SGD(tune.groups_of(model, members))
    batches = Batches(ROWS, lambda rows: (X[rows], Y[rows]), 16, device=device)
    settings = Settings(graph=graph, epochs=epochs, checkpoint=path)
    return Trainer(model, optimiser, batches, batches, settings, members, progress=False)


def learned(run, member):
    (group,) = (group for group in tune.groups_of(run.model, [member]))
    return group["params"]


def test_one_that_diverges_is_stopped_and_touches_no_other(tmp_path):
    without, run = trainer([0.1, None, 0.5]), trainer([0.1, 1e38, 0.5], tmp_path / "c")
    without.fit()
    run.fit()
    stopped = run.members[1]
    assert (
        "diverged in epoch 1" in stopped.stopped and [m.stopped for m in (run.members[0], run.members[2])] == [None] * 2
    )
    for member, alone in zip((run.members[0], run.members[2]), without.members, strict=True):
        for ours, theirs in zip(learned(run, member), learned(without, alone), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert member.history[-1]["valid_accuracy"] == alone.history[-1]["valid_accuracy"]
    again = trainer([0.1, 1e38, 0.5], tmp_path / "c")
    assert again.resume() and again.members[1].stopped == stopped.stopped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lr", [0.2, 1e38])  # the second one's member diverges, and the others go on
def test_captured_steps_of_a_sweep_are_plain_ones(lr):
    plain, captured = (trainer([0.1, lr, 0.5], device="cuda", graph=graph) for graph in (False, True))
    plain.fit()
    captured.fit()
    assert captured.step.plain is None and len(captured.step._graphs) == 1
    assert (
        [bool(m.stopped) for m in captured.members]
        == [bool(m.stopped) for m in plain.members]
        == [False, lr > 1, False]
    )
    for member, other in zip(captured.members, plain.members, strict=True):
        for ours, theirs in zip(learned(captured, member), learned(plain, other), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["gradients", "parameters"])
def test_a_nan_that_reaches_all_is_traced_to_its_member(monkeypatch, where):
    """As on a GPU, where one member's NaN spoils every gradient of the batch."""
    run = trainer([0.1, 0.1, 0.1])
    (bad,) = (m for m in run.members if m.name == "run1")
    if where == "parameters":
        with torch.no_grad():
            learned(run, bad)[0][0, 0] = torch.nan
    real = run.step.gradients

    def gradients(group):
        sums = real(group)
        spoilt = "run1" in run.step.names and run.steps >= 2
        return torch.full_like(sums, torch.nan) if spoilt or sums.isnan().any() else sums

    monkeypatch.setattr(run.step, "gradients", gradients)
    run.fit()
    assert [bool(m.stopped) for m in run.members] == [False, True, False]
    assert all(p.isfinite().all() for m in run.alive() for p in learned(run, m))
    assert all(len(m.history) == 3 for m in run.alive())


def test_when_all_diverge_the_run_fails():
    with pytest.raises(WorkError, match="training diverged in epoch 1"):
        trainer([1e38, 1e38]).fit()


def test_memory_is_said_and_too_large_a_sweep_refused(monkeypatch, capsys):
    run = trainer([0.1, 0.2])
    tune.announce(run)
    assert "2 runs at once need about" in capsys.readouterr().out
    monkeypatch.setattr(tune, "free_memory", lambda device: 1)
    with pytest.raises(UserError, match="2 runs need more memory than there is; at most 0 fit"):
        tune.announce(run)


def test_peft_loads_a_members_folder(swept):
    """Its format is PEFT's: here it is loaded into a plain model of the same shape."""
    from fastlora.finetune.imdb import TextClassifier

    words = len(load_file(swept / "model.safetensors")["embedding.weight"])
    for folder in (swept / "adapters").iterdir():
        model = fastlora.load_adapter(TextClassifier(words, 100, 2), folder)
        assert model.fc1.r == json.loads((folder / "adapter_config.json").read_text())["r"]
