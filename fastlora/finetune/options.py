"""The flags of the programs, checked where they are read.

To add a program: a module with `add_arguments(parser)`, which begins with `add_shared`, `train(args)` and
`load_predictor(run)`; a line in `fastlora.cli.PROGRAMS`; what it leaves in a run's folder in `run.RUN_FILES`; its data
in `data.FILES`, `homes.SOURCES` and `sample`; a run of it in `tests/finetune/killed.py`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastlora.errors import UserError

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def number(kind: type, least: float, most: float, what: str) -> Callable[[str], float]:
    """An argparse type: an int or float from `least` to `most`, `what` in words."""

    def parsed(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parsed


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    return number(int, least, most, f"a whole number from {least} to {most}")


positive = number(float, 1e-30, 1e30, "a finite number above zero that float32 has")  # alpha / rank by far too


def folder_name(text: str) -> Path:
    """An argparse type: a folder's name. An empty one would be the current folder, which nobody asked for."""
    if not text:
        raise argparse.ArgumentTypeError("a folder's name is empty")
    return Path(text)


MEMBER = {"lr": positive, "rank": whole(1, 1024), "alpha": positive, "seed": whole(0, 2**32 - 1)}


def swept(text: str) -> dict[str, list]:
    """An argparse type: "lr=0.3,1 rank=2" to the values of each key."""
    values: dict[str, list] = {}
    for part in text.split():
        key, equals, given = part.partition("=")
        if key not in MEMBER or not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(MEMBER)} with =value,value,...")
        try:
            found = [MEMBER[key](value) for value in given.split(",")]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{key}: {error}") from None
        if key in values or len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{key} is given twice, or one of its values")
        values[key] = found
    if not values:
        raise argparse.ArgumentTypeError("it is empty; 'lr=0.3,1 rank=2,8' would be two rates times two ranks")
    return values


def add_shared(parser: argparse.ArgumentParser, recipe: Mapping) -> None:
    """The flags of every `fastlora train` program. Those without a default leave the choice to its `recipe` (None)."""
    add, said = parser.add_argument, ("epochs", "rank", "alpha", "batch_size", "lr")
    parser.epilog = "defaults: " + ", ".join(f"--{name.replace('_', '-')} {recipe[name]:g}" for name in said)
    data = "data folder; a small made-up sample; or FASTLORA_DATA, the cache, the network (default)"
    add("--data", default="auto", metavar="DIR|sample|auto", help=data)
    add("--output", type=folder_name, required=True, metavar="DIR", help="the run's folder")
    add("--impl", choices=("fused", "eager"), default="fused", help="the LoRA layer (default fused)")
    add("--epochs", type=whole(1), metavar="N", help="passes over the training data")
    add("--rank", type=MEMBER["rank"], metavar="R", help="rank of the update")
    add("--alpha", type=MEMBER["alpha"], metavar="X", help="lora_alpha: the update is scaled by alpha / rank")
    add("--batch-size", type=whole(1), metavar="N")
    add("--lr", type=MEMBER["lr"], metavar="X", help="learning rate")
    seed = "0 (default) to 2^32 - 1: the adapter's start and the order of batches"
    add("--seed", type=MEMBER["seed"], default=0, metavar="N", help=seed)
    add("--device", default="auto", metavar="cpu|cuda[:N]|auto", help="default: cuda if there")
    add("--resume", action="store_true", help="go on with the unfinished run in --output, or begin one")
    add("--train-samples", type=whole(2), metavar="N", help="train on the first N rows only")
    add("--test-samples", type=whole(1), metavar="N", help="test on the first N rows only")


def add_steps(parser: argparse.ArgumentParser) -> None:
    """The flags of the programs that run on this package's trainer: how a training step is taken."""
    add = parser.add_argument
    batches = "batches whose gradients are summed into one step (default 1)"
    add("--accumulate", type=whole(1), default=1, metavar="N", help=batches)
    add("--precision", choices=tuple(PRECISIONS), help="default: fp32, or what the program prefers on a GPU")
    add("--no-graph", action="store_true", help="on a GPU: do not capture the step as a CUDA graph")
    add("--compile", action="store_true", help="pass the model through torch.compile")
    text = f"train every combination of values at once, as in 'lr=0.3,1 rank=2,8'; {', '.join(MEMBER)} can be swept"
    add("--sweep", type=swept, metavar="KEY=V,V...", help=text)


def complete(args: argparse.Namespace, recipe: Mapping) -> None:
    """Let `args` hold what decides the run: of `recipe` what the flags did not give, or have no flag for."""
    for name in getattr(args, "sweep", None) or ():
        if name != "seed" and getattr(args, name) is not None:
            raise UserError(f"--{name} is given beside --sweep, which has values of its own for it")
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if "precision" in recipe:
        args.precision = PRECISIONS[args.precision]


def pick_device(name: str) -> torch.device:
    """The torch device of `--device`; UserError when it is unknown or not here."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(("cuda" if here else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such kind of device; cpu, cuda or cuda:0 are known") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= here:
        raise UserError(f"--device {name}: no CUDA device of that number here ({here} found)")
    return device
