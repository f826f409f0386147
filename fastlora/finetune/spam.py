"""`fastlora train spam`: SMS spam, with GPT-2. A language model's last token made to tell ham from spam.

Source: Raschka, "Build a Large Language Model (From Scratch)", chapter 6 and appendix E.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora import env
from fastlora.errors import UserError
from fastlora.files import clear_leftovers, sha256, write_bytes
from fastlora.finetune import gpt2, parallel
from fastlora.finetune import run as runs
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import FILES, Batches, Data, data_digest, locate, read_texts
from fastlora.finetune.gpt2 import CONFIGS, GPT2
from fastlora.finetune.homes import missing
from fastlora.finetune.options import add_steps, chosen, defaults, pick_device, step_choices
from fastlora.finetune.run import CHECKPOINT, MODEL
from fastlora.finetune.step import Settings
from fastlora.finetune.trainer import Trainer
from fastlora.finetune.tune import adapt, fine_tune, groups_of, members_of
from fastlora.linear import FusedLoRALinear

LABELS, RANDOM = ("ham", "spam"), "random"
BASE_SEED = 0  # of random weights


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained: AdamW at a constant rate, as published."""

    epochs: int = 5
    lr: float = 8e-4
    weight_decay: float = 0.1
    batch_size: int = 8
    rank: int = 16
    alpha: float = 16.0  # the updates are scaled by alpha / rank
    eval_every: int = 50  # steps between evaluations on the validation messages; checkpoints are written as often


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program alone."""
    add = parser.add_argument
    add("--model", choices=tuple(CONFIGS), help="size (default gpt2; nano with --data sample)")
    weights = f"folder that holds {gpt2.WEIGHTS}, or random (default: gpt2's from the Hugging Face hub's cache, nano's "
    add("--weights", metavar="DIR|random", help=f"{weights}random)")
    activations = "compute activations again in the backward pass instead of keeping them"
    add("--grad-checkpointing", action="store_true", help=activations)
    add_steps(parser)
    parser.epilog = defaults(Recipe())


def train(args: argparse.Namespace) -> None:
    """Fine-tune, test, and leave everything in `args.output`; `args` as the flags. Joins torchrun's processes."""
    with parallel.joined(pick_device(args.device)) as (world, device):
        _train(args, world, device)


def _train(args: argparse.Namespace, world: parallel.World, device: torch.device) -> None:
    folder, recipe = args.output, chosen(Recipe(), args)
    members = members_of(args, recipe)
    size = args.model or ("nano" if args.data == "sample" else "gpt2")
    weights = find_base(args.weights, size)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    how = step_choices(args, "bf16" if bf16 else "fp32")
    settings = runs.settings_of(
        args, recipe, precision=how["precision"], device=device.type, processes=world.size, model=size,
        weights=str(weights or RANDOM), weights_sha256=weights and sha256(weights),
        data_sha256=data_digest(args.data, "spam"),
    )  # fmt: skip
    with runs.run_folder(folder, settings, args.resume, world, device) as begun:
        if begun == runs.FINISHED:
            return
        data = load_data(args, recipe, world, device)
        kept = folder / MODEL if begun and (folder / MODEL).exists() else None
        model = make_base(size, weights, kept)
        if world.first and kept is None:
            for file in FILES["gpt2"] if args.data != "sample" else ():  # so that `predict` finds them
                (folder / "gpt2").mkdir(exist_ok=True)
                clear_leftovers(folder / "gpt2")
                write_bytes(folder / file, (vocabulary(data.folder) / file).read_bytes())
            write_checkpoint(folder / MODEL, {name: model.state_dict()[name] for name in random_names(model, weights)})
        model.to(device)
        model.grad_checkpointing = args.grad_checkpointing
        adapt(model, members, args.impl, "all-linear")
        if how["precision"] != "float32":
            for layer in model.modules():  # frozen weights in the dtype that autocast would cast them to at every use
                if isinstance(layer, FusedLoRALinear):
                    layer.weight.data = layer.weight.data.to(getattr(torch, how["precision"]))
                    layer.bias.data = layer.bias.data.to(layer.weight.dtype)
        training = Settings(epochs=recipe.epochs, every=recipe.eval_every, checkpoint=folder / CHECKPOINT, **how)
        optimiser = torch.optim.AdamW(groups_of(model, members), weight_decay=recipe.weight_decay, fused=True)
        trainer = Trainer(model, optimiser, data.train, data.valid, training, members, world)

        settings["base"] = str(weights or "random weights, frozen")
        title, layer = f"Spam, {size}, {args.impl}", model.blocks[0].attention.query
        fine_tune(args, settings, trainer, data, layer, begun, title)


def load_data(args: argparse.Namespace, recipe: Recipe, world: parallel.World, device: torch.device) -> Data:
    """Read and encode the messages, all as long as the longest of the training messages."""
    folder = locate(args.data, "spam")
    encoding, length = _encoding(args.data, folder), None
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, limit in (("train", args.train_samples), ("valid", None), ("test", args.test_samples)):
        texts, labels = read_texts(folder / "spam" / f"{name}.parquet", len(LABELS), limit, "Text", "Label")
        parts[name] = gpt2.encode(texts, encoding, length), torch.tensor(labels)
        length = parts[name][0].shape[1]
    sizes = {name: len(labels) for name, (_, labels) in parts.items()}
    whole = recipe.batch_size * world.size
    if sizes["train"] < whole:
        raise UserError(f"{folder}/spam/train.parquet: {sizes['train']} messages do not fill one batch of {whole}")

    def batches(name: str) -> Batches:
        ids, labels = parts[name]
        return Batches(len(labels), lambda rows: (ids[rows], labels[rows]), recipe.batch_size, name == "train", device,
                       world)  # fmt: skip

    if world.first:
        print(f"{' + '.join(f'{size:,}' for size in sizes.values())} messages of {length} tokens", flush=True)
    train = batches("train")
    tokens = len(train) * train.rows(0) * length
    return Data(folder, train, batches("valid"), batches("test"), tokens, {"length": length}, (length,))


def _encoding(data: object, folder: Path):
    """GPT-2's encoding; its single bytes for the sample, which has to do without files and network."""
    return gpt2.byte_encoding() if data == "sample" else gpt2.gpt2_encoding(vocabulary(folder))


def vocabulary(folder: Path) -> Path:
    """The folder that holds GPT-2's vocabulary: `folder`, or where `--data auto` finds it."""
    return locate("auto", "gpt2") if missing(folder, "gpt2") else folder


# The frozen base: GPT-2's weights from a file, or random ones, which are kept with the run.


def find_base(named: str | None, size: str) -> Path | None:
    """The file of the base weights that `--weights` means, or None for random ones."""
    if named == RANDOM or (named is None and size == "nano"):
        return None
    return gpt2.find_weights(None if named is None else env.expanded(named)).resolve()


def make_base(size: str, weights: Path | None, kept: Path | None = None) -> GPT2:
    """The model with its frozen weights from the file `weights`, or random ones; its head is random in any case.

    What is random comes from the file `kept`, of the run that goes on: another version of torch may draw otherwise.
    """
    torch.manual_seed(BASE_SEED)
    model = GPT2(CONFIGS[size])
    if weights is not None:
        gpt2.load_weights(model, weights)
    if kept is not None:
        fill(model, kept, read_checkpoint(kept)[0], random_names(model, weights))
    return model


def random_names(model: GPT2, weights: Path | None) -> set[str]:
    """The names of what no file of weights has."""
    return {name for name in model.state_dict() if weights is None or name.startswith("head.")}


def load_predictor(run: Path) -> runs.Predictor:
    """A function that labels messages, (label, probability) each, from a finished run's folder.

    Raises UserError when a file is missing or damaged, or the base weights are no longer where they were.
    """
    report = runs.read_report(run)
    weights = None if report["weights"] == RANDOM else Path(report["weights"])
    encoding, model = _encoding(report["dataset"], run), make_base(report["model"], weights, run / MODEL)
    if weights and report.get("weights_sha256") not in (None, sha256(weights)):  # earlier versions left none
        raise UserError(f"{weights}: not the base weights that {run} was trained on")
    fastlora.load_adapter(model, run).eval()
    return runs.predictor(LABELS, lambda texts: model(gpt2.encode(texts, encoding, report["length"])))
