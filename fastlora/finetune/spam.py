"""`fastlora train spam`: SMS spam, with GPT-2. A language model's last token made to tell ham from spam.

Source: Raschka, "Build a Large Language Model (From Scratch)", chapter 6 and appendix E.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fastlora
from fastlora.errors import UserError
from fastlora.files import sha256
from fastlora.finetune import gpt2, parallel
from fastlora.finetune import run as runs
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import FILES, Batches, Data, data_digest, locate, read_texts
from fastlora.finetune.homes import convert, missing
from fastlora.finetune.options import add_shared, add_steps, complete
from fastlora.finetune.tune import adapt, fine_tune, groups_of, members_of
from fastlora.linear import FusedLoRALinear

LABELS, RANDOM = ("ham", "spam"), "random"
BASE_SEED = 0  # of random weights


RECIPE = {  # as published: AdamW at a constant rate
    "epochs": 5,
    "lr": 8e-4,
    "weight_decay": 0.1,
    "batch_size": 8,
    "rank": 16,
    "alpha": 16.0,  # the updates are scaled by alpha / rank
    "eval_every": 50,  # steps between evaluations on the validation messages; checkpoints are written as often
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program."""
    add_shared(parser, RECIPE)
    add = parser.add_argument
    add("--model", choices=tuple(gpt2.CONFIGS), help="size (default gpt2; nano with --data sample)")
    weights = f"folder that holds {gpt2.WEIGHTS}, or random (default: gpt2's from the Hugging Face hub's cache, nano's "
    add("--weights", metavar="DIR|random", help=f"{weights}random)")
    activations = "compute activations again in the backward pass instead of keeping them"
    add("--grad-checkpointing", action="store_true", help=activations)
    add_steps(parser)


@parallel.joined
def train(args: argparse.Namespace, device: torch.device) -> None:
    """Fine-tune, test, and leave everything in `args.output`; `args` as the flags."""
    folder = args.output
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    size = "nano" if args.data == "sample" else "gpt2"
    complete(args, RECIPE | {"model": size, "precision": "bf16" if bf16 else "fp32"})
    members = members_of(args)
    random = args.weights == RANDOM or (args.weights is None and args.model == "nano")
    weights = None if random else gpt2.find_weights(args.weights)
    settings = runs.settings_of(
        args, device=device.type, processes=parallel.size(), weights=str(weights or RANDOM),
        weights_sha256=weights and sha256(weights), data_sha256=data_digest(args.data, "spam"),
    )  # fmt: skip
    with runs.run_folder(folder, settings, args.resume, device) as unfinished:
        if not unfinished:
            return
        data = load_data(args, device)
        begun = (folder / runs.MODEL).exists()
        model, drawn = make_base(args.model, weights, folder / runs.MODEL if begun else None)
        if parallel.first() and not begun:
            if args.data != "sample":  # so that `predict` finds it
                convert("gpt2", [vocabulary(data.folder) / file for file in FILES["gpt2"]], folder / "gpt2")
            write_checkpoint(folder / runs.MODEL, drawn)
        model.to(device)
        model.grad_checkpointing = args.grad_checkpointing
        adapt(model, members, args.impl, "all-linear")
        if args.precision != "float32":
            for layer in model.modules():  # frozen weights in the dtype that autocast would cast them to at every use
                if isinstance(layer, FusedLoRALinear):
                    layer.weight.data = layer.weight.data.to(getattr(torch, args.precision))
                    layer.bias.data = layer.bias.data.to(layer.weight.dtype)
        optimiser = torch.optim.AdamW(groups_of(model, members), weight_decay=args.weight_decay, fused=True)
        settings["base"] = str(weights or "random weights, frozen")
        title, layer = f"Spam, {args.model}, {args.impl}", model.blocks[0].attention.query
        fine_tune(args, settings, model, optimiser, members, data, layer, title)


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Read and encode the messages, all as long as the longest of the training messages."""
    folder = locate(args.data, "spam")
    encoding, length, parts = _encoding(args.data, folder), None, []
    for name, limit in (("train", args.train_samples), ("valid", None), ("test", args.test_samples)):
        texts, labels = read_texts(folder / "spam" / f"{name}.parquet", len(LABELS), limit, ("Text", "Label"))
        rows = TensorDataset(gpt2.encode(texts, encoding, length), torch.tensor(labels))
        length = rows.tensors[0].shape[1]
        parts.append(Batches(len(rows), rows.__getitem__, args.batch_size, name == "train", device))
    train, whole = parts[0], args.batch_size * parallel.size()
    if train.size < whole:
        raise UserError(f"{folder}/spam/train.parquet: {train.size} messages do not fill one batch of {whole}")
    if parallel.first():
        print(f"{' + '.join(f'{part.size:,}' for part in parts)} messages of {length} tokens", flush=True)
    return Data(folder, *parts, len(train) * whole * length, {"length": length}, (length,))


def _encoding(data: str, folder: Path):
    """GPT-2's encoding; its single bytes for the sample, which has to do without files and network."""
    return gpt2.byte_encoding() if data == "sample" else gpt2.gpt2_encoding(vocabulary(folder))


def vocabulary(folder: Path) -> Path:
    """The folder that holds GPT-2's vocabulary: `folder`, or where `--data auto` finds it."""
    return locate("auto", "gpt2") if missing(folder, "gpt2") else folder


def make_base(size: str, weights: Path | None, kept: Path | None) -> tuple[gpt2.GPT2, dict[str, Tensor]]:
    """The model with its frozen weights from the file `weights`, or random ones, and what of it is random.

    That is its head in any case. It comes from the file `kept`, of a run that goes on, if there is one: another version
    of torch may draw otherwise.
    """
    torch.manual_seed(BASE_SEED)
    model = gpt2.GPT2(gpt2.CONFIGS[size])
    if weights is not None:
        gpt2.load_weights(model, weights)
    drawn = {name: t for name, t in model.state_dict().items() if weights is None or name.startswith("head.")}
    if kept is not None:
        fill(model, kept, read_checkpoint(kept)[0], set(drawn))
    return model, drawn


def load_predictor(run: Path) -> runs.Predictor:
    """What labels messages by the finished run in a folder; UserError when a file of it or its base is not there."""
    report = runs.read_report(run)
    weights = None if report["weights"] == RANDOM else Path(report["weights"])
    encoding, (model, _) = _encoding(report["dataset"], run), make_base(report["model"], weights, run / runs.MODEL)
    if weights and report.get("weights_sha256") not in (None, sha256(weights)):  # earlier versions left none
        raise UserError(f"{weights}: not the base weights that {run} was trained on")
    fastlora.load_adapter(model, run).eval()
    return runs.predictor(LABELS, lambda texts: model(gpt2.encode(texts, encoding, report["length"])))
