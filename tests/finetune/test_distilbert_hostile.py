"""`fastlora train distilbert` and what strangers, accidents and full disks do to its files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from fastlora.cli import main
from fastlora.errors import UserError
from fastlora.finetune import checkpoint, distilbert, hub_model
from fastlora.finetune.checkpoint import read_checkpoint, write_checkpoint
from fastlora.finetune.hub_trainer import HubTrainer

Q_LIN = "distilbert.transformer.layer.0.attention.q_lin.weight"


def arguments(model, output, *more):
    return ["train", "distilbert", "--data", "sample", "--model", str(model), "--output", str(output), *more,
            "--device", "cpu", "--epochs", "3", "--train-samples", "40", "--test-samples", "8", "--batch-size", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.hub_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(model, run)) == 0
    return run


@pytest.fixture
def stranger(model, tmp_path):
    """A copy of the model's folder."""
    return Path(shutil.copytree(model, tmp_path / "stranger"))


def refused(capsys, command) -> str:
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastlora: ")
    return error


def change(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def weights(folder: Path, edit) -> None:
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


# A stranger's model


def _code(folder):
    code = f"from transformers import DistilBertConfig as C\nopen({str(folder / 'ran')!r}, 'w')\n"
    (folder / "evil.py").write_text(code)
    change(folder / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="evil")


def _pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _elsewhere(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pipe(folder):
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")


def _config(**settings):
    return lambda folder: change(folder / "config.json", **settings)


def _weights(edit):
    return lambda folder: weights(folder, edit)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_code, "cannot be loaded"),
        (_pickle, "holds no model.safetensors"),
        (_elsewhere, "'../elsewhere.safetensors'"),
        (_pipe, "'tokenizer_config.json' is not a regular file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "config.json").write_text('{"a":' * 10**5), "cannot be loaded"),
        (lambda folder: os.truncate(folder / "config.json", 5 << 30), "5368709120 bytes, more"),
        (_weights(lambda held: held.pop(Q_LIN)), f"its weights lack '{Q_LIN}'"),
        (_weights(lambda held: held[Q_LIN].fill_(float("nan"))), f"'{Q_LIN}' holds numbers that are not finite"),
        (_weights(lambda held: held.update({Q_LIN: held[Q_LIN].double() + 1e300})), "not finite"),
        (_weights(lambda held: held.update({Q_LIN: held[Q_LIN].long()})), "float"),
        (_weights(lambda held: held.update({Q_LIN.removeprefix("distilbert."): held.pop(Q_LIN).long()})), "float"),
        (_config(n_layers=3), "its weights lack"),
        (_config(n_layers=10**6), "1000000 layers"),
        (_config(n_heads=0), "cannot be loaded"),
        (_config(dim="a\x1b[2J"), "cannot be loaded"),
        (_config(dropout=float("nan")), "cannot be loaded"),
        (_config(pad_token_id=10**9), "cannot be loaded"),
        (_config(model_type="timm_wrapper"), "cannot be loaded"),
        (_config(vocab_size=10**12), ""),
        (_config(quantization_config=[1]), "quantization_config"),
        (_config(attn_implementation="evil/kernel"), "'evil/kernel'"),
        (_config(transformers_weights="x.bin"), "transformers_weights"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_strangers_model_is_refused(stranger, tmp_path, monkeypatch, capsys, spoil, said):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    spoil(stranger)
    error = refused(capsys, arguments(stranger, tmp_path / "run"))
    assert f"--model {stranger}" in error and said in error and "\x1b" not in error
    assert not (stranger / "ran").exists() and not (tmp_path / "run" / "run.json").exists()


def test_a_model_of_the_cache_without_a_head_trains(model, tmp_path):
    """Offline; and the head alone may be missing, since it is trained and kept."""
    cache = tmp_path / "hub" / "models--some--body"
    shutil.copytree(model, cache / "snapshots" / "0123")
    weights(cache / "snapshots" / "0123", lambda held: [held.pop(name) for name in list(held) if "classifier" in name])
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", *arguments("some/body", tmp_path / "run")], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loaded and predicted" in done.stdout


def test_an_unknown_home_is_named(tmp_path, capsys):
    assert "~nobodyhere/x" in refused(capsys, arguments("~nobodyhere/x", tmp_path / "run"))


# A finished run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "([a-z._]+)+!"},  # PEFT would run it for ever
        {"target_modules": ["q_lin", "nothing"], "modules_to_save": ["q_lin"]},
        {"rank_pattern": {"([a-z._]+)+!": 4}},
        {"init_lora_weights": "pissa"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"r": 10**9},
        {"peft_type": "XLORA"},
        {"megatron_config": {"a": 1}},
        {"task_type": "CAUSAL_LM"},
    ],
)
def test_a_strangers_adapter_config_is_refused(run, capsys, settings):
    change(run / "adapter_config.json", **settings)
    assert str(run) in refused(capsys, ["predict", run, "fine"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_a_pipe_or_a_pickle_is_refused(run, capsys, name):
    (run / name).unlink()
    torch.save({}, run / "adapter_model.bin")
    assert name in refused(capsys, ["predict", run, "fine"])
    os.mkfifo(run / name)
    assert name in refused(capsys, ["predict", run, "fine"])


@pytest.mark.parametrize(
    "settings",
    [{"max_length": value} for value in (-1, 0, 1000, 10**30, float("inf"), "5")]
    + [{"model": value} for value in (["x"], None, "", "/a\0b", "../../etc")]
    + [{"impl": ["x"]}, {"base_sha256": None}],
)
def test_a_damaged_report_is_refused(run, settings):
    change(run / "report.json", **settings)
    with pytest.raises(UserError, match="run"):
        distilbert.load_predictor(run)


@pytest.mark.parametrize("change_base", [
    lambda folder: weights(folder, lambda held: held[Q_LIN].neg_()),
    lambda folder: change(folder / "config.json", n_heads=4),
])  # fmt: skip
def test_another_base_model_is_refused(run, stranger, capsys, change_base):
    change(run / "report.json", model=str(stranger))
    assert main(["predict", str(run), "fine"]) == 0
    change_base(stranger)
    capsys.readouterr()
    assert "not the one that the run adapted" in refused(capsys, ["predict", run, "fine"])
    told = json.loads((run / "report.json").read_text())
    del told["base_sha256"]  # as earlier versions left it: nothing to compare with
    (run / "report.json").write_text(json.dumps(told))
    assert main(["predict", str(run), "fine"]) == 0


def test_a_base_model_saved_again_is_the_same(run, stranger):
    """By another version of transformers, which keeps other notes in another order."""
    change(run / "report.json", model=str(stranger))
    settings = json.loads((stranger / "config.json").read_text())
    notes = {"transformers_version": "4.0.0", "_name_or_path": "elsewhere", "architectures": ["DistilBertModel"]}
    (stranger / "config.json").write_text(json.dumps(dict(reversed((settings | notes).items()))))
    assert main(["predict", str(run), "fine"]) == 0


def test_any_text_gets_an_answer(run):
    """Also one that is no Unicode, or far longer than what is read of it."""
    answers = distilbert.load_predictor(run)(["good \udcff", "", "a " * 500_000, "a " * 5_000_000])
    assert len(answers) == 4 and answers[2] == answers[3]
    assert len(hub_model.readable("a" * 10**7, 64)) == 64_000


# A run that goes on


@pytest.fixture
def killed(run):
    """As if the run had been killed before its results were written."""
    for name in ("report.json", "history.csv", "curves.png", "adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    return run


def _edited(edit):
    def spoil(path):
        tensors, state = read_checkpoint(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        edit(tensors, state)
        write_checkpoint(path, tensors, state)

    return spoil


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        _flipped,
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({}, path),
        _edited(lambda tensors, state: state.pop("history")),
        _edited(lambda tensors, state: state["history"][-1].update(step="x")),
        _edited(lambda tensors, state: state["history"].extend(state["history"] * 9)),
        _edited(lambda tensors, state: state.update(groups="x")),
        _edited(lambda tensors, state: state.pop("run")),
        _edited(lambda tensors, state: [t.fill_(float("nan")) for name, t in tensors.items() if "best." in name]),
    ],
)
def test_a_spoiled_checkpoint_is_refused(model, killed, capsys, spoil):
    spoil(killed / "checkpoint.safetensors")
    assert "checkpoint.safetensors" in refused(capsys, arguments(model, killed, "--resume"))


def test_other_data_or_another_base_is_refused(model, killed, capsys, monkeypatch):
    texts = distilbert._texts
    monkeypatch.setattr(distilbert, "_texts", lambda *args: {
        name: (lines, [1 - label for label in labels]) for name, (lines, labels) in texts(*args).items()})
    assert "the data is not what" in refused(capsys, arguments(model, killed, "--resume"))
    monkeypatch.undo()
    monkeypatch.setattr(hub_model, "digest", lambda *_: "another")
    assert "the base model is not what" in refused(capsys, arguments(model, killed, "--resume"))


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [
        (HubTrainer, "training_step", 2, []),
        (HubTrainer, "training_step", 5, ["checkpoint.safetensors", "run.json"]),
        (checkpoint, "write_bytes", 2, ["checkpoint.safetensors", "run.json"]),
        (hub_model, "write_adapter", 1, ["checkpoint.safetensors", "run.json"]),
    ],
)
def test_a_run_whose_disk_was_full_goes_on_to_the_same_bits(
    model, finished, tmp_path, monkeypatch, capsys, owner, name, call, left
):
    run, whole, calls = tmp_path / "run", getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return whole(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        assert main(arguments(model, run)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastlora: the disk is full")
    assert sorted(path.name for path in run.iterdir()) == left
    assert main(arguments(model, run, "--resume")) == 0
    assert small.left(run) == small.left(finished)


def test_a_run_that_diverges_leaves_nothing(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path / "run", "--lr", "1e30")) == 1
    assert "training diverged in epoch 1" in capsys.readouterr().err
    assert not any((tmp_path / "run").iterdir())


def test_what_is_the_users_stays(model, tmp_path):
    """No model card, no folder of checkpoints with its rotation: only a run's own files are written."""
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    for name in ("checkpoint-1/mine.txt", "trainer_state.json", "training_args.bin"):
        (run / name).write_text("mine")
    assert main(arguments(model, run)) == 0
    for name in ("checkpoint-1/mine.txt", "trainer_state.json", "training_args.bin"):
        assert (run / name).read_text() == "mine"
    assert not (run / "README.md").exists() and not (run / "checkpoints").exists()
