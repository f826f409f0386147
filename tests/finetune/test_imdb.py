"""The IMDb program, whole, on the sample that the package makes."""

from __future__ import annotations

import csv
import json
import shutil

import pandas as pd
import pytest
import small
import torch
from safetensors.torch import load_file

from fastlora.cli import main
from fastlora.finetune import imdb
from fastlora.finetune import run as runs
from fastlora.finetune.checkpoint import read_checkpoint, write_checkpoint
from fastlora.finetune.run import RUN_FILES
from fastlora.finetune.trainer import Trainer

GOOD, BAD = "a wonderful film with a great story and superb acting", "what an awful boring mess, a waste"


def train(output, *flags):
    return main(
        [
            "train",
            "imdb",
            "--data",
            "sample",
            "--output",
            str(output),
            "--epochs",
            "3",
            "--device",
            "cpu",
            "--train-samples",
            "800",
            "--test-samples",
            "200",
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("imdb") / "run"
        assert train(folder) == 0
    return folder


def test_a_run_leaves_everything(run, cpu_path):
    assert {path.name for path in run.iterdir() if path.name[0] != "."} == set(RUN_FILES) - {
        "gpt2",
        "checkpoints",
        "adapters",
    }
    made = json.loads((run / "report.json").read_text())
    assert set(small.FIELDS) <= set(made)
    assert (made["task"], made["impl"], made["path"], made["dataset"]) == ("imdb", "fused", cpu_path, "sample")
    assert made["batches"] == {"train": 12, "valid": 1, "test": 4}
    assert made["trainable_parameters"] == 456 + 258
    assert made["adapter_parameters"] == 456 and made["full_layer_parameters"] == 12_800
    assert made["adapter_bytes"] == (run / "adapter_model.safetensors").stat().st_size
    assert made["test_accuracy"] > 0.9 and made["valid_accuracy"] > 0.8
    assert made["pretrained"]["test_accuracy"] > 0.9
    assert min(made["train_seconds"], made["tokens_per_second"], made["peak_memory_bytes"]) > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1, 0.1, 0.01])


def test_the_adapter_is_a_b_and_the_head_in_pefts_format(run):
    tensors = load_file(run / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "base_model.model.fc1.lora_A.weight": (2, 100),
        "base_model.model.fc1.lora_B.weight": (128, 2),
        "base_model.model.fc2.weight": (2, 128),
        "base_model.model.fc2.bias": (2,),
    }
    assert all(bool(t.any()) for t in tensors.values())
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["modules_to_save"]) == (2, ["fc2"])


def test_predict_tells_good_from_bad(run, capsys):
    assert main(["predict", str(run), GOOD, BAD]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["positive", "negative"]
    assert all(0.5 <= float(line[1]) <= 1 for line in lines)
    assert lines[0][2] == GOOD


def test_predict_reads_standard_input(run, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{BAD}\n\n{GOOD}\n".encode() + b"\xff odd\n")))
    assert main(["predict", str(run), "-"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in out[:2]] == ["negative", "positive"]
    assert len(out) == 3


def test_prediction_is_that_of_the_trained_model(run):
    # Dense and by hand: mean of vectors, W + scaling B A, ReLU, head.
    base, state = read_checkpoint(run / "model.safetensors")
    words, adapter = {word: i for i, word in enumerate(state["words"], 2)}, load_file(run / "adapter_model.safetensors")
    down, up = (adapter[f"base_model.model.fc1.lora_{part}.weight"] for part in "AB")
    mean = base["embedding.weight"][[words.get(word, 1) for word in BAD.replace(",", "").split()]].mean(0)
    hidden = torch.relu((base["fc1.weight"] + 8.0 * up @ down) @ mean + base["fc1.bias"])
    weight, bias = (adapter[f"base_model.model.fc2.{part}"] for part in ("weight", "bias"))
    chances = (weight @ hidden + bias).softmax(0)
    ((label, chance),) = imdb.load_predictor(run)([BAD])
    assert label == imdb.LABELS[int(chances.argmax())]
    assert chance == pytest.approx(float(chances.max()), abs=1e-5)


def test_eager_gives_the_same_accuracy(run, tmp_path):
    assert train(tmp_path / "eager", "--impl", "eager") == 0
    fused, eager = (json.loads((folder / "report.json").read_text()) for folder in (run, tmp_path / "eager"))
    assert (eager["impl"], eager["path"]) == ("eager", "eager")
    assert abs(fused["test_accuracy"] - eager["test_accuracy"]) <= 0.002
    assert fused["trainable_parameters"] == eager["trainable_parameters"]


def test_the_same_seed_gives_the_same_bits(run, tmp_path):
    assert train(tmp_path / "again") == 0
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter_model.safetensors"
    ).read_bytes()


def test_the_tutorials_recipe(tmp_path):
    recipe = imdb.RECIPES["tutorial"]
    assert [recipe[key] for key in ("rank", "alpha", "clip", "lr", "decay")] == [2, 2 * 0.1, 0.1, 1.0, 0.1]
    assert train(tmp_path / "run", "--recipe", "tutorial") == 0
    made = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (made["recipe"], made["clip"], made["scale"]) == ("tutorial", 0.1, None)


def test_vectors_from_a_file(tmp_path):
    path = tmp_path / "glove.txt"
    generator = torch.Generator().manual_seed(0)
    path.write_text(
        "".join(
            f"{word} " + " ".join(map(str, torch.randn(100, generator=generator).tolist())) + "\n"
            for word in ("the", "film", "great", "awful", "wonderful", "boring")
        )
    )
    assert train(tmp_path / "run", "--vectors", str(path)) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["vectors"].startswith("glove.txt, 6 of")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["pretraining", "fine-tuning", "leaving"])
def test_a_killed_run_resumed_ends_with_the_same_bits(run, tmp_path, monkeypatch, moment, capsys):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "pretraining":
            patch.setattr(Trainer, "evaluate", killed)
        elif moment == "fine-tuning":
            record = Trainer._record
            patch.setattr(Trainer, "_record", lambda self, *a: killed() if self.steps > 13 else record(self, *a))
        else:
            patch.setattr(runs, "leave", killed)
        with pytest.raises(Killed):
            train(tmp_path / "run")
    assert train(tmp_path / "run") == 2
    assert "go on with it by --resume" in capsys.readouterr().err
    assert train(tmp_path / "run", "--lr", "0.5", "--resume") == 2
    assert "lr = 1.0, not 0.5" in capsys.readouterr().err
    assert train(tmp_path / "run", "--resume") == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    (ours, kept), (theirs, same) = (read_checkpoint(folder / "model.safetensors") for folder in (tmp_path / "run", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and kept["words"] == same["words"]
    assert train(tmp_path / "run", "--resume") == 0
    assert "finished already" in capsys.readouterr().out


def test_a_finished_run_is_never_overwritten(run, capsys):
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert train(run) == 2
    error = capsys.readouterr().err
    assert "holds a finished run" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def damage(folder, name, how):
    path = folder / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize(
    "name", ["report.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"]
)
def test_predict_names_the_damaged_file(run, tmp_path, capsys, name, how):
    folder = shutil.copytree(run, tmp_path / "run")
    damage(folder, name, how)
    assert main(["predict", str(folder), GOOD]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder) in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "imdb" / "test.parquet").unlink(), "lacks imdb/test.parquet"),
        (lambda f: (f / "ag_news" / "train.parquet").write_bytes(b"PAR1 no"), "ag_news/train.parquet: damaged"),
        (
            lambda f: pd.DataFrame({"review": ["x"], "label": [0]}).to_parquet(f / "imdb" / "train.parquet"),
            "no column 'text'; it has 'review', 'label'",
        ),
        (
            lambda f: pd.DataFrame({"text": ["x", "y"], "label": [0, 3]}).to_parquet(f / "imdb" / "train.parquet"),
            "no text with one of the labels 0 to 1, but has label 3, text 'y'",
        ),
        (
            lambda f: pd.DataFrame({"text": ["x"], "label": [0]}).to_parquet(f / "imdb" / "train.parquet"),
            "at least 2 are needed",
        ),
    ],
)
def test_wrong_data_is_one_line_and_costs_no_output_folder(tmp_path, capsys, change, message):
    from fastlora.finetune.sample import make_sample

    folder = make_sample(tmp_path / "data")
    change(folder)
    command = ["train", "imdb", "--data", str(folder), "--output", str(tmp_path / "run"), "--epochs", "1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    make_sample(tmp_path / "whole")
    assert main([*command[:3], str(tmp_path / "whole"), *command[4:], "--train-samples", "100"]) == 0


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--alpha", "1e300"], 2, "--alpha: '1e300' is not a finite number"),
        (["--lr", "1e300"], 2, "--lr: '1e300' is not a finite number"),
        (["--lr", "1e30", "--epochs", "1", "--train-samples", "60"], 1, "diverged"),
    ],
)
def test_numbers_too_large_are_one_line_and_no_finished_run(tmp_path, capsys, flags, status, message):
    assert train(tmp_path / "run", *flags) == status
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlora:")]
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run" / "report.json").exists()


def edited(folder, name, change):
    tensors, state = read_checkpoint(folder / name)
    change(tensors)
    write_checkpoint(folder / name, tensors, **state)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("fc1.weight"),
    lambda t: t.update({"a\n\x1b[2Jb": torch.zeros(1)}),
    lambda t: t.update({"fc2.bias": torch.zeros(4, dtype=torch.int64)}),
    lambda t: t.update({"fc2.bias": torch.full((4,), torch.nan)}),
    lambda t: t.update({"embedding.weight": t["embedding.weight"][:-1].clone()}),
])  # fmt: skip
def test_predict_demands_the_tensors_of_the_model_and_no_others(run, tmp_path, capsys, change):
    folder = shutil.copytree(run, tmp_path / "run")
    edited(folder, "model.safetensors", change)
    assert main(["predict", str(folder), GOOD]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and error.count("\n") == 1 and error[:-1].isprintable()


def test_predict_demands_the_words_of_the_model(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    write_checkpoint(folder / "model.safetensors", read_checkpoint(folder / "model.safetensors")[0])
    assert main(["predict", str(folder), GOOD]) == 2
    assert "model.safetensors: of another model: embedding.weight" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "change"), [
    ("model.safetensors", lambda content: content.pop("fc1.weight")),
    ("checkpoint.safetensors", lambda content: content.pop("model.fc2.bias")),
])  # fmt: skip
def test_resuming_with_files_of_another_run_is_refused(run, tmp_path, capsys, name, change):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "report.json").unlink()
    edited(folder, name, change)
    assert train(folder, "--resume") == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_published_accuracy_is_passed_on_the_real_data(data_dir, tmp_path):
    accuracy = {}
    for impl in ("fused", "eager"):
        assert main(["train", "imdb", "--data", str(data_dir), "--impl", impl, "--output", str(tmp_path / impl)]) == 0
        made = json.loads((tmp_path / impl / "report.json").read_text())
        assert made["batches"] == {"train": 372, "valid": 20, "test": 391}
        accuracy[impl] = made["test_accuracy"]
    assert accuracy["fused"] >= 0.84
    assert abs(accuracy["fused"] - accuracy["eager"]) <= 0.002
    good = "One of the best films I have seen in years: moving, beautifully acted and wonderfully written."
    bad = "Terrible. The acting is awful, the plot makes no sense and I was bored after ten minutes."
    assert [label for label, _ in imdb.load_predictor(tmp_path / "fused")([good, bad])] == ["positive", "negative"]
