"""The programs with a tiny model, for tests: `python small.py train spam ...`; and what a run leaves, for comparing."""

import csv
import json
import sys
from pathlib import Path

TIMES = ("train_seconds", "total_seconds", "tokens_per_second", "peak_memory_bytes", "dataset", "device", "pretrained")


def shrink():
    """Let `--model nano` be tiny."""
    import torch

    from fastlora.finetune import gpt2

    torch.set_num_threads(1)
    gpt2.CONFIGS["nano"] = gpt2.GPT2Config(width=16, heads=2, layers=1, token_std=1.0)


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
