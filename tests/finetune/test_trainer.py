"""The trainer: what it computes, and that a run resumed ends with the bits of one never stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.errors import UserError, WorkError
from fastlora.finetune.checkpoint import read_checkpoint, write_checkpoint
from fastlora.finetune.data import Batches
from fastlora.finetune.step import Settings
from fastlora.finetune.trainer import Member, Trainer

ROWS = 200
X = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Stop(Exception):
    pass


def take(rows):
    return X[rows], Y[rows]


def trainer(path=None, optimiser="adamw", epochs=3, hidden=16, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, hidden), nn.Dropout(0.2), nn.ReLU(), nn.Linear(hidden, 3))
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimiser == "adamw":
        made = torch.optim.AdamW(trained, lr=1e-2)
    else:
        made = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    settings = Settings(epochs=epochs, checkpoint=path, **{"clip": 1.0, "decay": 0.5, **settings})
    train = Batches(160, take, 16)
    valid = Batches(40, lambda rows: take(rows + 160), 16)
    return Trainer(model, made, train, valid, settings, (Member(),), progress=False)


def stop_at(run, monkeypatch, rows):
    """Let `run` stop before the checkpoint that follows its evaluation number `rows`."""
    record = run._record

    def stop(*args):
        record(*args)
        if len(run.members[0].history) == rows:
            raise Stop

    monkeypatch.setattr(run, "_record", stop)


def rows_of(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_it_learns_and_says_so():
    run = trainer(epochs=8, decay=1.0)
    run.fit()
    history = run.members[0].history
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert [row["step"] for row in history] == list(range(10, 81, 10))
    assert history[-1]["valid_accuracy"] >= 0.8 > history[0]["valid_accuracy"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert not run.model[0].bias.grad


def test_a_plain_loop_gives_the_same_bits():
    run = trainer(epochs=2)
    run.fit()
    twin = trainer(epochs=2)
    for epoch in range(2):
        torch.manual_seed(twin.steps)  # each epoch's own
        twin.optimiser.param_groups[0]["lr"] = 1e-2 * 0.5**epoch
        for x, y in (twin.train.at(epoch, i) for i in range(10)):
            twin.optimiser.zero_grad()
            nn.functional.cross_entropy(twin.model(x), y).backward()
            nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
            twin.optimiser.step()
            twin.steps += 1
    for ours, theirs in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_evaluation_weighs_rows_not_batches():
    run = trainer()
    ((_, loss, accuracy),) = run.evaluate(run.valid)
    run.model.eval()
    with torch.no_grad():
        logits = run.model(X[160:])
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, Y[160:])), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(1) == Y[160:]).float().mean()))
    run.model.train()
    run.evaluate(run.valid)
    assert run.model.training


@pytest.mark.parametrize(("optimiser", "rows_until"), [("adamw", 2), ("adamw", 3), ("sgd", 4), ("adamw", 7)])
def test_resumed_ends_with_the_same_bits(tmp_path, monkeypatch, optimiser, rows_until):
    settings = {"optimiser": optimiser, "eval_every": 4, "accumulate": 1}
    whole = trainer(**settings)
    whole.fit()
    stopped = trainer(tmp_path / "c", **settings)
    stop_at(stopped, monkeypatch, rows_until)
    with pytest.raises(Stop):
        stopped.fit()
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "c", **settings)
    with torch.no_grad():
        resumed.model[0].weight.zero_()
    assert resumed.resume()
    assert (resumed.epoch, resumed.position) != (0, 0)
    resumed.fit()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert rows_of(resumed.members[0].history) == rows_of(whole.members[0].history)


def test_resuming_where_there_is_nothing(tmp_path):
    assert not trainer(tmp_path / "c").resume()
    assert not trainer().resume()


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 0.99])
def test_a_damaged_checkpoint_is_named_and_nothing_changes(tmp_path, at):
    path = tmp_path / "checkpoint.safetensors"
    run = trainer(path, epochs=1)
    run.fit()
    content = path.read_bytes()
    path.write_bytes(content[: int(at * len(content))])
    fresh = trainer(path)
    before = [p.clone() for p in fresh.model.parameters()]
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: damaged"):
        fresh.resume()
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.model.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    trainer(tmp_path / "c", epochs=1).fit()
    with pytest.raises(UserError, match="another model"):
        trainer(tmp_path / "c", hidden=17).resume()


def test_a_strangers_safetensors_is_no_checkpoint(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "c")
    with pytest.raises(UserError, match="another model"):
        trainer(tmp_path / "c").resume()


def test_checkpoints_come_back_exactly(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(7), "c": torch.randn(4).bfloat16(), "d": torch.empty(0)}
    plain = {"x": 0.1 + 0.2, "y": [1, None, "é"], "z": {"0": True}}
    write_checkpoint(tmp_path / "c", tensors, **plain)
    read, state = read_checkpoint(tmp_path / "c")
    assert state == plain
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line():
    run = trainer(optimiser="sgd")
    with torch.no_grad():
        run.model[3].bias[0] = float("nan")
    with pytest.raises(WorkError, match=r"diverged in epoch 1: the loss is nan"):
        run.fit()
    assert run.members[0].history == []


def test_a_loss_in_validation_that_is_not_finite_ends_the_run(tmp_path):
    run = trainer(tmp_path / "c", epochs=1)
    run.valid = Batches(40, lambda rows: (X[rows] * torch.inf, Y[rows]), 16)
    with pytest.raises(WorkError, match="diverged in epoch 1: the loss is nan"):
        run.fit()
    assert run.members[0].history == [] and not (tmp_path / "c").exists()


def test_numbers_that_are_not_finite_are_never_kept(tmp_path):
    run = trainer(tmp_path / "c")
    with torch.no_grad():
        run.model[3].bias[0] = -torch.inf
    with pytest.raises(WorkError, match="diverged"):
        run.save()
    assert not (tmp_path / "c").exists()
