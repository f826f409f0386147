"""`fastlora train spam`: SMS spam, with GPT-2. A language model's last token made to tell ham from spam.

Source: Raschka, "Build a Large Language Model (From Scratch)", chapter 6 and appendix E.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora import env
from fastlora.errors import UserError, shown
from fastlora.files import sha256
from fastlora.finetune import gpt2, parallel
from fastlora.finetune import run as runs
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import FILES, Batches, locate, read_texts
from fastlora.finetune.gpt2 import CONFIGS, GPT2
from fastlora.finetune.options import MOST_RANK, add_steps, chosen, pick_device, step_choices
from fastlora.finetune.run import CHECKPOINT, MODEL
from fastlora.finetune.trainer import Settings, Trainer
from fastlora.linear import FusedLoRALinear

LABELS, RANDOM = ("ham", "spam"), "random"


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained: AdamW at a constant rate, as published.

    Attributes:
        epochs, lr, weight_decay, batch_size: of AdamW.
        rank, alpha: of the adapters; the update is scaled by alpha / rank.
        eval_every: steps between evaluations on the validation messages; checkpoints are written as often.
    """

    epochs: int = 5
    lr: float = 8e-4
    weight_decay: float = 0.1
    batch_size: int = 8
    rank: int = 16
    alpha: float = 16.0
    eval_every: int = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program alone."""
    add = parser.add_argument
    add("--model", choices=tuple(CONFIGS), help="size (default gpt2; nano with --data sample)")
    weights = f"folder that holds {gpt2.WEIGHTS}, or random (default: gpt2's from the Hugging Face hub's cache, nano's "
    add("--weights", metavar="DIR|random", help=f"{weights}random)")
    activations = "compute activations again in the backward pass instead of keeping them"
    add("--grad-checkpointing", action="store_true", help=activations)
    add_steps(parser)


def train(args: argparse.Namespace) -> None:
    """Fine-tune, test, and leave everything in `args.output`; `args` as the flags. Joins torchrun's processes."""
    world, device = parallel.start(pick_device(args.device))
    _train(args, world, device)
    parallel.stop()


def _train(args: argparse.Namespace, world: parallel.World, device: torch.device) -> None:
    began = time.perf_counter()
    folder, recipe = args.output, chosen(Recipe(), args)
    size = args.model or ("nano" if args.data == "sample" else "gpt2")
    weights = find_base(args.weights, size)
    digest = weights and sha256(weights)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    how = step_choices(args, "bf16" if bf16 else "fp32")
    settings = {"task": "spam", "data": args.data, "impl": args.impl, "model": size, "weights": str(weights or RANDOM),
                "weights_sha256": digest, **asdict(recipe), **how, "grad_checkpointing": args.grad_checkpointing,
                "seed": args.seed, "device": device.type, "processes": world.size, "train_samples": args.train_samples,
                "test_samples": args.test_samples}  # fmt: skip
    del settings["graph"]  # the same arithmetic
    with runs.run_folder(folder, settings, args.resume) if world.first else nullcontext(False) as begun:
        begun = world.told(begun, device)
        if begun and runs.finished(folder):
            return
        data = load_data(args, recipe, world, device)
        run = runs.fingerprint(settings | {"texts": data.digest})
        model = make_base(size, weights, args.seed)
        if begun and (folder / MODEL).exists():
            load_base(model, weights, folder, run)
        elif world.first:
            write_checkpoint(folder / MODEL, {**_of_no_file(model, weights), "run": run})
        model.to(device)
        model.grad_checkpointing = args.grad_checkpointing
        torch.manual_seed(args.seed + 1)
        adapt(model, recipe.rank, recipe.alpha, args.impl)
        if how["precision"] != "float32":
            _store_frozen(model, getattr(torch, how["precision"]))
        training = Settings(epochs=recipe.epochs, every=recipe.eval_every, checkpoint=folder / CHECKPOINT, run=run,
                            seed=args.seed, **how)  # fmt: skip
        trainer = Trainer(model, make_optimiser(model, recipe), data.train, data.valid, training, world=world)
        if begun and trainer.resume() and world.first:
            print(f"resumed after step {trainer.steps}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        history = trainer.fit(_say if world.first else None)
        _, train_accuracy = trainer.evaluate(data.again)
        _, accuracy = trainer.evaluate(data.test)
        if not world.first:
            return

        fastlora.save_adapter(model, folder)
        for file in FILES["gpt2"]:  # so that `predict` finds them
            if (data.folder / file).exists():
                (folder / "gpt2").mkdir(exist_ok=True)
                shutil.copyfile(data.folder / file, folder / file)
        base = f"random weights of seed {args.seed}, frozen" if weights is None else str(weights)
        tokens = len(data.train) * data.train.batch_size * data.length * recipe.epochs
        total = round(time.perf_counter() - began, 2)
        layer = model.blocks[0].attention.query
        runs.leave(folder, history, f"Spam, {size}, {args.impl}: {accuracy:.1%} on test", device, {
            "task": "spam", "impl": args.impl, "path": runs.path_of(args.impl, layer, recipe.batch_size, data.length),
            "dataset": args.data if args.data in ("sample", "auto") else str(data.folder), "base": base, "model": size,
            "weights": str(weights or RANDOM), "weights_sha256": digest, "length": data.length,
            "batches": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
            **asdict(recipe), **runs.counts(model), "train_seconds": round(trainer.seconds, 3),
            "tokens_per_second": round(tokens / max(trainer.seconds, 1e-9)), "plain_steps_because": trainer.step.plain,
            "train_accuracy": train_accuracy, "valid_accuracy": history[-1]["valid_accuracy"],
            "test_accuracy": accuracy, "total_seconds": total, "precision": how["precision"],
            "accumulate": args.accumulate, "processes": world.size, "seed": args.seed})  # fmt: skip
        print(f"base: {base}")
        print(f"accuracy: train {train_accuracy:.2%}, valid {history[-1]['valid_accuracy']:.2%}, test {accuracy:.2%}; "
              f"trained {trainer.seconds:.1f} s, {total:.1f} s in all; everything is in {folder}")  # fmt: skip


@dataclass
class Data:
    """What a run reads: the data's folder, tokens per message (`length`), and batches; `again` is train in order."""

    folder: Path
    digest: str
    length: int
    train: Batches
    again: Batches
    valid: Batches
    test: Batches


def load_data(args: argparse.Namespace, recipe: Recipe, world: parallel.World, device: torch.device) -> Data:
    """Read and encode the messages, all as long as the longest of the training messages."""
    folder = locate(args.data, "spam", *(["gpt2"] if args.data == "auto" else []))
    encoding, length, digest = _encoding(args.data, folder), None, hashlib.sha256()
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, limit in (("train", args.train_samples), ("valid", None), ("test", args.test_samples)):
        texts, labels = read_texts(folder / "spam" / f"{name}.parquet", len(LABELS), limit, "Text", "Label")
        parts[name] = gpt2.encode(texts, encoding, length), torch.tensor(labels)
        length = parts[name][0].shape[1]
        for part in parts[name]:
            digest.update(part.numpy())
    sizes = {name: len(labels) for name, (_, labels) in parts.items()}
    whole = recipe.batch_size * world.size
    if sizes["train"] < whole:
        raise UserError(f"{folder}/spam/train.parquet: {sizes['train']} messages do not fill one batch of {whole}")

    def batches(name: str, seed: int | None = None) -> Batches:
        def take(rows: Tensor) -> tuple[Tensor, Tensor]:
            return parts[name][0][rows], parts[name][1][rows]

        return Batches(sizes[name], take, recipe.batch_size, seed, seed is not None, device, world)

    if world.first:
        print(f"{' + '.join(f'{size:,}' for size in sizes.values())} messages of {length} tokens", flush=True)
    return Data(folder, digest.hexdigest(), length, batches("train", args.seed), batches("train"), batches("valid"),
                batches("test"))  # fmt: skip


def _encoding(data: object, folder: Path):
    """GPT-2's encoding; its single bytes for the sample, which has to do without files and network."""
    return gpt2.byte_encoding() if data == "sample" else gpt2.gpt2_encoding(folder)


# The frozen base: GPT-2's weights from a file, or random ones, which are kept with the run.


def find_base(named: str | None, size: str) -> Path | None:
    """The file of the base weights that `--weights` means, or None for random ones."""
    if named == RANDOM or (named is None and size == "nano"):
        return None
    return gpt2.find_weights(None if named is None else env.expanded(named)).resolve()


def make_base(size: str, weights: Path | None, seed: int) -> GPT2:
    """The model with its frozen weights from the file, or random ones; its head is random in any case."""
    torch.manual_seed(seed)
    model = GPT2(CONFIGS[size])
    if weights is not None:
        gpt2.load_weights(model, weights)
    return model


def load_base(model: GPT2, weights: Path | None, folder: Path, run: str | None = None) -> None:
    """Read into `model` what its run kept of it; UserError when it is damaged or, with `run`, another run's."""
    kept = read_checkpoint(folder / MODEL)
    if run is not None and kept.get("run") != run:
        raise UserError(f"{folder / MODEL}: the data is not what the run was started with, or another version's")
    tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
    fill(model, folder / MODEL, tensors, set(_of_no_file(model, weights)))


def _of_no_file(model: GPT2, weights: Path | None) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if weights is None or name.startswith("head.")}


def adapt(model: GPT2, rank: int, alpha: float, impl: str) -> None:
    """Put a LoRA layer in the place of every linear layer, and freeze the rest."""
    fastlora.inject(model, r=rank, lora_alpha=alpha, target_modules="all-linear", layer_class=runs.LAYERS[impl])


def _store_frozen(model: GPT2, dtype: torch.dtype) -> None:
    """Keep the frozen linear weights in the dtype that autocast would cast them to at every use."""
    for layer in model.modules():
        if isinstance(layer, FusedLoRALinear):
            layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)


def make_optimiser(model: GPT2, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW on what `model` trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def load_predictor(run: Path) -> Callable[[list[str]], list[tuple[str, float]]]:
    """A function that labels messages, (label, probability) each, from a finished run's folder.

    Raises UserError when a file is missing or damaged, or the base weights are no longer where they were.
    """
    report = runs.read_report(run)
    length = runs.number_in(run, report, "length", gpt2.LONGEST)
    size, weights = report.get("model"), report.get("weights")
    if size not in [*CONFIGS] or not isinstance(weights, str):
        raise UserError(f"{run / runs.REPORT}: damaged, its model is {shown(size)} with the weights {shown(weights)}")
    weights = None if weights == RANDOM else Path(weights)
    encoding = _encoding(report.get("dataset"), run)
    model = make_base(size, weights, 0)
    if weights and report.get("weights_sha256") not in (None, sha256(weights)):  # earlier versions left none
        raise UserError(f"{weights}: not the base weights that {run} was trained on")
    load_base(model, weights, run)
    adapt(model, runs.number_in(run, report, "rank", MOST_RANK), 1.0, "fused")
    fastlora.load_adapter(model, run)
    model.eval()

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[tuple[str, float]]:
        chances, classes = model(gpt2.encode(texts, encoding, length)).softmax(-1).max(-1)
        return [(LABELS[c], float(p)) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    return predict


def _say(row: dict) -> None:
    from tqdm import tqdm

    tqdm.write(f"epoch {row['epoch']:.2f}, step {row['step']}: loss {row['train_loss']:.4f}, validation loss "
               f"{row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}")  # fmt: skip
