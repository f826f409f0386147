"""The trainer: what it computes, and that a run resumed ends with the bits of one never stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.errors import UserError, WorkError
from fastlora.finetune.batches import Batches
from fastlora.finetune.checkpoint import pack, read_checkpoint, unpack, write_checkpoint
from fastlora.finetune.trainer import Plan, Trainer

ROWS = 200
X = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Stop(Exception):
    pass


def take(rows):
    return X[rows], Y[rows]


def trainer(path=None, optimiser="adamw", epochs=3, hidden=16, **plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, hidden), nn.Dropout(0.2), nn.ReLU(), nn.Linear(hidden, 3))
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimiser == "adamw":
        made = torch.optim.AdamW(trained, lr=1e-2)
    else:
        made = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.5)
    plan = Plan(epochs, checkpoint=path, progress=False, **{"clip": 1.0, **plan})
    train = Batches(160, take, 16, seed=1)
    valid = Batches(40, lambda rows: take(rows + 160), 16)
    return Trainer(model, made, train, valid, plan, torch.device("cpu"), scheduler)


def rows_of(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_it_learns_and_says_so():
    run = trainer(epochs=8)
    history = run.fit()
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert [row["step"] for row in history] == list(range(10, 81, 10))
    assert history[-1]["valid_accuracy"] >= 0.8 > history[0]["valid_accuracy"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[1]["learning_rate"] == pytest.approx(history[0]["learning_rate"] / 2)
    assert not run.model[0].bias.grad


def test_a_plain_loop_gives_the_same_bits():
    run = trainer(epochs=2)
    run.fit()
    twin = trainer(epochs=2)
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))  # the draws of the model's making
    for epoch in range(2):
        for x, y in twin.train.epoch(epoch):
            twin.optimiser.zero_grad()
            nn.functional.cross_entropy(twin.model(x), y).backward()
            nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
            twin.optimiser.step()
        twin.scheduler.step()
    for ours, theirs in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_evaluation_weighs_rows_not_batches():
    run = trainer()
    loss, accuracy = run.evaluate(run.valid)
    run.model.eval()
    with torch.no_grad():
        logits = run.model(X[160:])
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, Y[160:])), rel=1e-6)
    assert accuracy == pytest.approx(float((logits.argmax(1) == Y[160:]).float().mean()))
    run.model.train()
    run.evaluate(run.valid)
    assert run.model.training


@pytest.mark.parametrize(("optimiser", "rows_until"), [("adamw", 1), ("adamw", 3), ("sgd", 4), ("adamw", 7)])
def test_resumed_ends_with_the_same_bits(tmp_path, optimiser, rows_until):
    settings = {"optimiser": optimiser, "eval_every": 4, "checkpoint_every": 3, "accumulate": 1}
    whole = trainer(**settings)
    whole.fit()
    seen = []

    def stop(row):
        seen.append(row)
        if len(seen) == rows_until:
            raise Stop

    with pytest.raises(Stop):
        trainer(tmp_path / "c", **settings).fit(stop)
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "c", **settings)
    with torch.no_grad():
        resumed.model[0].weight.zero_()
    assert resumed.resume()
    assert (resumed.epoch, resumed.position) != (0, 0)
    resumed.fit()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert rows_of(resumed.history) == rows_of(whole.history)


def test_resuming_where_there_is_nothing(tmp_path):
    assert not trainer(tmp_path / "c").resume()
    assert not trainer().resume()


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_nothing_changes(tmp_path, at, damage):
    path = tmp_path / "checkpoint.safetensors"
    run = trainer(path, epochs=1)
    run.fit()
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    content[place] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:place])
    fresh = trainer(path)
    before = [p.clone() for p in fresh.model.parameters()]
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: (damaged|not a checkpoint)"):
        fresh.resume()
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.model.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    trainer(tmp_path / "c", epochs=1).fit()
    with pytest.raises(UserError, match="another model"):
        trainer(tmp_path / "c", hidden=17).resume()


def test_a_checkpoint_of_other_settings_is_named(tmp_path):
    trainer(tmp_path / "c", epochs=1, run="these").fit()
    with pytest.raises(UserError, match="other settings"):
        trainer(tmp_path / "c", run="those").resume()


def put(where, key, value):
    def change(tensors, state):
        {"tensors": tensors, "state": state}[where][key] = value

    return change


def lack(where, key):
    return lambda tensors, state: {"tensors": tensors, "state": state}[where].pop(key)


STRANGE = {
    **{f"no {key}": lack("state", key) for key in ("epoch", "position", "steps", "seconds", "rows", "history", "groups",
                                                   "optimiser", "scheduler", "scaler", "run")},
    **{f"no {key}": lack("tensors", key) for key in ("sums", "generator.cpu", "model.0.weight", "optimiser.0.exp_avg")},
    **{f"{key} {value}": put("state", key, value) for key, value in (
        ("epoch", 99), ("epoch", -1), ("epoch", "a"), ("epoch", True), ("position", 10), ("position", -1),
        ("steps", None), ("steps", 11), ("seconds", "x"), ("rows", -5), ("history", 7), ("history", []),
        ("history", [{}]), ("groups", 7), ("groups", []), ("groups", [{"params": [0]}]), ("optimiser", []),
        ("optimiser", {"x": {}}), ("optimiser", {"9": {"step": 1}}), ("scheduler", None),
        ("scheduler", {"last_epoch": "z"}), ("scaler", 7))},
    "generator short": put("tensors", "generator.cpu", torch.zeros(1, 5, dtype=torch.uint8)),
    "generator of floats": put("tensors", "generator.cpu", torch.zeros(1, 5056)),
    "generator of zeros": put("tensors", "generator.cpu", torch.zeros(1, 5056, dtype=torch.uint8)),
    "generator 0-d": put("tensors", "generator.cpu", torch.tensor(1)),
    "sums long": put("tensors", "sums", torch.zeros(5)),
    "optimiser.x": put("tensors", "optimiser.x", torch.zeros(5)),
    "optimiser.x.y": put("tensors", "optimiser.x.y", torch.zeros(5)),
    "exp_avg long": put("tensors", "optimiser.0.exp_avg", torch.zeros(5)),
    "model of nan": put("tensors", "model.0.weight", torch.full((16, 8), torch.nan)),
    "model of ints": put("tensors", "model.0.weight", torch.zeros(16, 8, dtype=torch.int64)),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c"
    trainer(path, epochs=1).fit()
    return path


@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_checkpoint_with_its_right_checksum_is_named_and_nothing_changes(checkpoint, tmp_path, strange):
    tensors, state = read_checkpoint(checkpoint)
    STRANGE[strange](tensors, state)
    write_checkpoint(tmp_path / "c", tensors, state)
    fresh = trainer(tmp_path / "c")
    before = [p.clone() for p in fresh.model.parameters()]
    generator = torch.get_rng_state()
    with pytest.raises(UserError) as told:
        fresh.resume()
    assert torch.equal(torch.get_rng_state(), generator)
    assert str(told.value).startswith(f"{tmp_path / 'c'}: ") and str(told.value).isprintable()
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.model.parameters(), strict=True))
    assert (fresh.epoch, fresh.steps, fresh.optimiser.state_dict()["state"]) == (0, 0, {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_strange_state_of_the_gpus_generator_leaves_the_cpus(tmp_path):
    model, device = nn.Linear(3, 2).cuda(), torch.device("cuda")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    tensors, state = pack(model, optimiser, None, device)
    tensors["generator.cuda"][8:] = 1  # no offset that a generator can have
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="generator is in no state"):
        unpack(tmp_path / "c", model, optimiser, None, device, tensors, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_strangers_safetensors_is_no_checkpoint(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "c")
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "c")


def test_checkpoints_come_back_exactly(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(7), "c": torch.randn(4).bfloat16(), "d": torch.empty(0)}
    state = {"x": 0.1 + 0.2, "y": [1, None, "é"]}
    write_checkpoint(tmp_path / "c", tensors, state)
    read, again = read_checkpoint(tmp_path / "c")
    assert again == state
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line():
    run = trainer(optimiser="sgd")
    with torch.no_grad():
        run.model[3].bias[0] = float("nan")
    with pytest.raises(WorkError, match=r"diverged in epoch 1: the loss is nan"):
        run.fit()
    assert run.history == []


def test_a_loss_in_validation_that_is_not_finite_ends_the_run(tmp_path):
    run = trainer(tmp_path / "c", epochs=1)
    run.valid = Batches(40, lambda rows: (X[rows] * torch.inf, Y[rows]), 16)
    with pytest.raises(WorkError, match="diverged in epoch 1: the loss is nan"):
        run.fit()
    assert run.history == [] and not (tmp_path / "c").exists()


def test_numbers_that_are_not_finite_are_never_kept(tmp_path):
    run = trainer(tmp_path / "c")
    with torch.no_grad():
        run.model[3].bias[0] = -torch.inf
    with pytest.raises(WorkError, match="diverged"):
        run.save()
    assert not (tmp_path / "c").exists()
