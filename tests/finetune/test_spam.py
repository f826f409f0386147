"""`train spam` and `predict` through the command line, with a tiny model; and the mistakes answered in a line."""

import json
import shutil

import pandas as pd
import pytest
import small
import torch

from fastlora import env
from fastlora.cli import main
from fastlora.finetune import gpt2, homes, spam

NANO = gpt2.CONFIGS["nano"]
RUN = ["train", "spam", "--data", "sample", "--model", "nano", "--epochs", "1", "--train-samples", "64"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(gpt2.CONFIGS, "nano", gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0))


def trained(folder, *more):
    assert main([*RUN, *more, "--output", str(folder)]) == 0
    return small.left(folder)


def refused(capsys, status, said, *argv):
    """The command line says one line that contains `said` and ends with `status`."""
    capsys.readouterr()
    assert main([str(part) for part in argv]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlora:")]
    assert len(lines) == 1 and said in lines[0], lines


def test_a_run_learns_reports_and_predicts(tmp_path, capsys, cpu_path):
    run = tmp_path / "run"
    assert main([*RUN[:6], "--epochs", "5", "--lr", "0.003", "--output", str(run)]) == 0
    told = json.loads((run / "report.json").read_text())
    assert [name for name in small.FIELDS if name not in told] == []
    assert told["batches"] == {"train": 75, "valid": 10, "test": 20}
    assert told["base"] == "random weights, frozen" and told["path"] == cpu_path
    assert "cpu" in told["plain_steps_because"]
    assert told["trainable_parameters"] == told["adapter_parameters"] == 16 * (4 * 32 + 2 * 80 + 18)
    assert told["test_accuracy"] >= 0.9 and told["train_accuracy"] >= 0.9  # the made-up messages are easy
    assert (run / "curves.png").stat().st_size > 1000
    steps = [int(row["step"]) for row in small.left(run)["history"]]
    assert steps == sorted({*range(50, 376, 50), *range(75, 376, 75)})

    capsys.readouterr()
    messages = pd.read_parquet(next(env.cache_dir().glob("sample-*/spam/test.parquet")))
    assert main(["predict", str(run), *messages["Text"]]) == 0
    labels = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    right = sum(label == spam.LABELS[number] for label, number in zip(labels, messages["Label"], strict=True))
    assert right / len(messages) == pytest.approx(told["test_accuracy"])

    refused(capsys, 2, "holds a finished run already", *RUN, "--output", run)
    assert main([*RUN[:6], "--epochs", "5", "--lr", "0.003", "--output", str(run), "--resume"]) == 0
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1])
    refused(capsys, 2, "damaged", "predict", run, "hello")


def test_eager_and_checkpointed_runs_are_the_same_training(tmp_path):
    fused = trained(tmp_path / "fused")
    again = trained(tmp_path / "again", "--grad-checkpointing")
    assert again["adapter"] == fused["adapter"]
    eager = trained(tmp_path / "eager", "--impl", "eager")
    assert eager["report"]["path"] == "eager"
    for row, other in zip(fused["history"], eager["history"], strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-4)
        assert row["valid_accuracy"] == other["valid_accuracy"]


def test_accumulated_small_batches_are_a_large_one(tmp_path):
    large = trained(tmp_path / "large", "--batch-size", "16")
    parts = trained(tmp_path / "parts", "--batch-size", "8", "--accumulate", "2")
    losses = [float(run["history"][-1]["valid_loss"]) for run in (parts, large)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [row["step"] for row in parts["history"]] == [row["step"] for row in large["history"]] == ["4"]


def test_half_precision_runs(tmp_path):
    want = float(trained(tmp_path / "fp32")["history"][-1]["valid_loss"])
    for precision in ("bf16", "fp16"):
        run = trained(tmp_path / precision, "--precision", precision)
        assert float(run["history"][-1]["valid_loss"]) == pytest.approx(want, rel=0.02)


def test_weights_from_a_folder(tmp_path, capsys):
    small.gpt2_weights(tmp_path / "weights", 9)
    told = trained(tmp_path / "run", "--weights", str(tmp_path / "weights"))["report"]
    assert told["base"] == str(tmp_path / "weights" / "model.safetensors")
    assert (tmp_path / "run" / "model.safetensors").stat().st_size < 10_000  # the head alone
    assert main(["predict", str(tmp_path / "run"), "hello"]) == 0
    shutil.rmtree(tmp_path / "weights")
    refused(capsys, 2, str(tmp_path / "weights"), "predict", tmp_path / "run", "hello")


def test_a_run_cut_short_while_it_begins_has_its_vocabulary_in_the_end(tmp_path, monkeypatch, data_dir):
    run = ["train", "spam", "--data", str(data_dir), "--model", "nano", "--epochs", "1", "--train-samples", "16"]
    run += ["--test-samples", "8", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        small.cut_writes(patch, after=2)  # run.json and encoder.json
        assert main(run) == 1
    assert main([*run, "--resume"]) == 0
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "gpt2" / name).read_bytes() == (data_dir / "gpt2" / name).read_bytes()
    assert main(["predict", str(tmp_path), "hello"]) == 0


def test_no_vocabulary_and_no_network(tmp_path, monkeypatch, capsys, data_dir):
    """It is fetched as the data sets are; a vocabulary that is there is taken."""

    def refuse(url, *_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(homes, "download_url_to_file", refuse)
    data = spam_data(tmp_path / "data")
    run = ["train", "spam", "--model", "nano", "--epochs", "1", "--data", str(data), "--output", str(tmp_path / "run")]
    refused(capsys, 1, "encoder.json: cannot be fetched ('no route')", *run)
    monkeypatch.setenv("FASTLORA_DATA", str(data_dir))
    assert main(run) == 0
    monkeypatch.delenv("FASTLORA_DATA")
    assert main(["predict", str(tmp_path / "run"), "hello"]) == 0


def test_base_weights_that_were_replaced_are_refused(tmp_path, capsys):
    run, weights = tmp_path / "run", tmp_path / "weights"
    small.gpt2_weights(weights, 1)
    trained(run, "--weights", str(weights))
    small.gpt2_weights(weights, 2)
    refused(capsys, 2, "not the base weights", "predict", run, "hello")
    told = json.loads((run / "report.json").read_text())
    del told["weights_sha256"]  # as earlier versions left it: nothing to compare with
    (run / "report.json").write_text(json.dumps(told))
    assert main(["predict", str(run), "hello"]) == 0
    (run / "report.json").unlink()
    refused(capsys, 2, "started with weights_sha256", *RUN, "--weights", weights, "--output", run, "--resume")


def test_the_real_batches(data_dir, tmp_path, capsys):
    args = spam_arguments("--data", str(data_dir), "--output", str(tmp_path))
    data = spam.load_data(args, torch.device("cpu"))
    assert [len(part) for part in (data.train, data.valid, data.test)] == [130, 19, 38]
    inputs, labels = data.train.at(0, 0)
    assert inputs.shape == (8, 120) and labels.shape == (8,)
    assert not torch.equal(inputs, data.train.at(1, 0)[0])
    assert sum(len(labels) for _, labels in data.valid.in_order()) == 149


def spam_arguments(*argv):
    import argparse

    from fastlora.finetune.options import complete

    parser = argparse.ArgumentParser()
    spam.add_arguments(parser)
    args = parser.parse_args(argv)
    complete(args, spam.RECIPE)
    return args


def spam_data(folder, rows=40):
    for name in ("train", "valid", "test"):
        path = folder / "spam" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(
            {"Label": [i % 2 for i in range(rows)], "Text": ["win" if i % 2 else "hi" for i in range(rows)]}
        ).to_parquet(path)
    return folder


def test_mistakes_are_one_line_and_touch_nothing(tmp_path, capsys, data_dir):
    output = tmp_path / "run"
    run = ["train", "spam", "--model", "nano", "--output", output]
    data = spam_data(tmp_path / "data")
    (data / "gpt2").mkdir()
    shutil.copy(data_dir / "gpt2" / "vocab.bpe", data / "gpt2")
    right = (data_dir / "gpt2" / "encoder.json").read_bytes()
    (data / "gpt2" / "encoder.json").write_bytes(right.replace(b"0", b"1", 1))
    refused(capsys, 2, "encoder.json", *run, "--data", data)
    shutil.copy(data_dir / "gpt2" / "encoder.json", data / "gpt2")
    refused(capsys, 2, "do not fill one batch", *run, "--data", data, "--batch-size", "64", "--resume")
    pd.DataFrame({"Label": [], "Text": []}).to_parquet(data / "spam" / "valid.parquet")
    refused(capsys, 2, "valid.parquet: holds no rows", *run, "--data", data, "--resume")
    (data / "spam" / "test.parquet").unlink()
    refused(capsys, 2, "lacks spam/test.parquet", *run, "--data", data, "--resume")
    refused(capsys, 2, "holds no model.safetensors", *run, "--data", "sample", "--weights", tmp_path)
    (tmp_path / "file").write_text("")
    elsewhere = (*run[:4], "--data", "sample", "--output", tmp_path / "file" / "x")
    refused(capsys, 2, "cannot be used as output folder", *elsewhere)
    assert not list(output.glob("*.safetensors")) and not (output / "report.json").exists()


@pytest.mark.slow
def test_nano_reaches_92_percent_from_random_weights(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(gpt2.CONFIGS, "nano", NANO)
    run = ["train", "spam", "--data", str(data_dir), "--model", "nano", "--weights", "random"]
    assert main([*run, "--output", str(tmp_path / "run")]) == 0
    told = small.left(tmp_path / "run")["report"]
    assert told["batches"] == {"train": 130, "valid": 19, "test": 38}
    assert told["test_accuracy"] >= 0.92
