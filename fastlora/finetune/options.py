"""The flags that every program shares, checked where they are read."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from fastlora.errors import UserError

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def whole(least: int, most: int = 2**31 - 1):
    """An argparse type: a whole number from `least` to `most`."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    return whole_number


def positive(text: str) -> float:
    """An argparse type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above zero")
    return value


def folder_name(text: str) -> Path:
    """An argparse type: a folder's name. An empty one would be the current folder, which nobody asked for."""
    if not text:
        raise argparse.ArgumentTypeError("a folder's name is empty")
    return Path(text)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The flags of every `fastlora train` program. Those without a default leave the choice to the program (None)."""
    parser.add_argument("--data", default="auto", metavar="DIR|sample|auto",
                        help="data folder; a small made-up sample; or FASTLORA_DATA, the cache, the network (default)")
    parser.add_argument("--output", type=folder_name, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--impl", choices=("fused", "eager"), default="fused", help="the LoRA layer (default fused)")
    parser.add_argument("--epochs", type=whole(1), metavar="N", help="passes over the training data")
    parser.add_argument("--rank", type=whole(1, 1024), metavar="R", help="rank of the update")
    parser.add_argument("--alpha", type=positive, metavar="X", help="lora_alpha: the update is scaled by alpha / rank")
    parser.add_argument("--batch-size", type=whole(1), metavar="N")
    parser.add_argument("--lr", type=positive, metavar="X", help="learning rate")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N",
                        help="0 (default) to 2^32 - 1, the seeds that all programs take")
    parser.add_argument("--device", default="auto", metavar="cpu|cuda[:N]|auto", help="default: cuda if there")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --output, if any")
    parser.add_argument("--train-samples", type=whole(2), metavar="N", help="train on the first N rows only")
    parser.add_argument("--test-samples", type=whole(1), metavar="N", help="test on the first N rows only")


def add_steps(parser: argparse.ArgumentParser) -> None:
    """The flags of the programs that run on this package's trainer: how a training step is taken."""
    parser.add_argument("--accumulate", type=whole(1), default=1, metavar="N",
                        help="batches whose gradients are summed into one step (default 1)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS),
                        help="default: fp32, or what the program prefers on a GPU")
    parser.add_argument("--no-graph", action="store_true", help="on a GPU: do not capture the step as a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="pass the model through torch.compile")


def step_choices(args: argparse.Namespace, default: str = "fp32") -> dict:
    """What `add_steps` read, as arguments of the trainer's `Plan`. The eager layer is left to plain steps.

    `default`: the precision where none is asked for, a key of `PRECISIONS`.
    """
    return {"accumulate": args.accumulate, "precision": PRECISIONS[args.precision or default], "compile": args.compile,
            "graph": args.impl == "fused" and not args.no_graph}


def pick_device(name: str):
    """The torch device of `--device`; UserError when it is unknown or not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such kind of device; cpu, cuda or cuda:0 are known") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device
