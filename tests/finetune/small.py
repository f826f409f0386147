"""The programs with a tiny model, for tests: `python small.py train spam ...`; and what a run leaves, for comparing."""

import csv
import json
import sys
from pathlib import Path

FIELDS = ("task", "impl", "path", "device", "dataset", "batches", "epochs", "trainable_parameters", "total_parameters",
          "adapter_parameters", "adapter_bytes", "full_layer_parameters", "train_seconds", "tokens_per_second",
          "peak_memory_bytes", "valid_accuracy", "test_accuracy", "seed", "versions")  # fmt: skip
TIMES = (
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "device",
    "pretrained",
    "fused_calls",
)  # the last: of one process


def shrink():
    """Let `--model nano` be tiny."""
    import torch

    from fastlora.finetune import gpt2

    torch.set_num_threads(1)
    gpt2.CONFIGS["nano"] = gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0)


def hub_model(folder: Path, kind: str = "distilbert") -> Path:
    """`folder` with a tiny classifier of transformers and a tokenizer that knows the sample's words."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizerFast, DistilBertConfig

    from fastlora.finetune import sample

    words = sorted({word for words in sample._WORDS.values() for word in words} | {"the", "was", "and", "i", "of", "a"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    shared = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.1}
    if kind == "bert":
        config = BertConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=64, intermediate_size=64, **shared)
    else:
        config = DistilBertConfig(n_layers=1, n_heads=2, dim=32, hidden_dim=64, **shared)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cut_writes(monkeypatch, after: int) -> None:
    """After `after` files the disk is full in the middle of one, however it is written."""
    import errno

    whole, left = Path.write_bytes, [after]

    def full(path, content):
        left[0] -= 1
        if left[0] < 0:
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path, content)

    def copied(source, target):
        full(Path(target), Path(source).read_bytes())

    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("copy", "copyfile"):
        monkeypatch.setattr(f"shutil.{name}", copied)


def gpt2_weights(folder: Path, seed: int) -> None:
    """Random weights of `nano` in `folder`, as transformers saves them."""
    import torch
    from transformers import GPT2Config, GPT2Model

    from fastlora.finetune import gpt2

    sizes = gpt2.CONFIGS["nano"]
    torch.manual_seed(seed)
    GPT2Model(GPT2Config(n_embd=sizes.width, n_head=sizes.heads, n_layer=sizes.layers)).save_pretrained(folder)


def left(folder: Path) -> dict:
    """What a finished run leaves, but for times."""
    report = json.loads((folder / "report.json").read_text())
    with open(folder / "history.csv", newline="") as file:
        history = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    return {
        "adapter": _tensors(folder / "adapter_model.safetensors"),
        "report": {key: value for key, value in report.items() if key not in TIMES},
        "history": history,
    }


def _tensors(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header and its numbers' bytes. The library writes the header's keys in no fixed order."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed
    from fastlora.cli import main

    shrink()
    sys.exit(main())
