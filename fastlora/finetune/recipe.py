"""What a program's recipe and the flags given with it come to."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from fastlora.errors import UserError

MOST_RANK = 1024
FLAGS = ("epochs", "lr", "rank", "alpha", "batch_size")


def chosen(recipe, args: argparse.Namespace):
    """`recipe`, a dataclass, with those of `FLAGS` that were given; UserError for a number that float32 has not."""
    given = {name: getattr(args, name) for name in FLAGS}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    numbers = torch.finfo(torch.float32)
    for flag, value in (("--lr", recipe.lr), ("--alpha", recipe.alpha / recipe.rank)):
        if not numbers.tiny <= value <= numbers.max:
            what = "the update's scaling, --alpha / --rank," if flag == "--alpha" else flag
            raise UserError(f"{what} is {value:g}, which is no number of float32")
    return recipe
