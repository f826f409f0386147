"""`fastlora train spam`: SMS spam, with GPT-2. A language model's last token made to tell ham from spam.

Source: Raschka, "Build a Large Language Model (From Scratch)", chapter 6 and appendix E.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastlora
from fastlora.errors import UserError, shown
from fastlora.finetune import gpt2_weights, parallel
from fastlora.finetune import report as reports
from fastlora.finetune.batches import Batches
from fastlora.finetune.files import CHECKPOINT, REPORT, fingerprint, run_folder
from fastlora.finetune.gpt2 import CONFIGS, GPT2
from fastlora.finetune.locate import locate
from fastlora.finetune.options import add_steps, pick_device, step_choices
from fastlora.finetune.plots import plot_history
from fastlora.finetune.recipe import MOST_RANK, chosen
from fastlora.finetune.spam_base import BASE, RANDOM, keep_base, kept_base, make_base, named_weights, weights_of
from fastlora.finetune.spam_data import (
    LABELS,
    LONGEST,
    SpamDataset,
    byte_encoding,
    encode,
    gpt2_encoding,
    keep_vocabulary,
)
from fastlora.finetune.trainer import Plan, Trainer
from fastlora.linear import FusedLoRALinear

HELP = "SMS spam: GPT-2 and the logits of its last token, every linear layer adapted"


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
    parser.add_argument("--model", choices=tuple(CONFIGS), help="size (default gpt2; nano with --data sample)")
    parser.add_argument("--weights", metavar="DIR|random",
                        help="folder that holds model.safetensors, or random (default: gpt2's from the Hugging Face "
                             "hub's cache, nano's random)")
    parser.add_argument("--grad-checkpointing", action="store_true",
                        help="compute activations again in the backward pass instead of keeping them")
    add_steps(parser)


def train(args: argparse.Namespace) -> None:
    """Fine-tune, test, and leave everything in `args.output`; `args` as the flags. Joins torchrun's processes."""
    world, device = parallel.start(pick_device(args.device))
    _train(args, world, device)
    parallel.stop()


def _train(args: argparse.Namespace, world: parallel.World, device: torch.device) -> None:
    began = time.perf_counter()
    recipe = chosen(Recipe(), args)
    size = args.model or ("nano" if args.data == "sample" else "gpt2")
    weights = named_weights(args.weights, size)
    digest = weights and gpt2_weights.sha256(weights)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    how = step_choices(args, "bf16" if bf16 else "fp32")
    settings = {"task": "spam", "data": args.data, "impl": args.impl, "model": size, "weights": str(weights or RANDOM),
                "weights_sha256": digest, **asdict(recipe), **how, "grad_checkpointing": args.grad_checkpointing,
                "seed": args.seed, "device": device.type, "processes": world.size, "train_samples": args.train_samples,
                "test_samples": args.test_samples}
    del settings["graph"]  # the same arithmetic
    with run_folder(args.output, settings, args.resume) if world.first else nullcontext(False) as begun:
        begun = parallel.told(begun, world, device)
        if begun and (args.output / REPORT).exists():
            if world.first:
                print(f"{args.output}: the run is finished already")
            return
        data = _load(args, recipe, world, device)
        origin = {"data": data.digest, "run": fingerprint(settings)}
        model = make_base(size, weights, args.seed)
        if begun and (args.output / BASE).exists():
            kept_base(model, weights, args.output, origin)
        elif world.first:
            keep_base(model, weights, args.output, origin)
        model.to(device)
        model.grad_checkpointing = args.grad_checkpointing
        torch.manual_seed(args.seed + 1)
        _adapt(model, recipe.rank, recipe.alpha, args.impl)
        if how["precision"] != "float32":
            _store_frozen(model, getattr(torch, how["precision"]))
        torch.manual_seed(args.seed + 2 + world.rank)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr,
                                      weight_decay=recipe.weight_decay, fused=True)
        plan = Plan(recipe.epochs, eval_every=recipe.eval_every, checkpoint=args.output / CHECKPOINT,
                    checkpoint_every=recipe.eval_every, run=origin["run"], **how)
        trainer = Trainer(model, optimiser, data.train, data.valid, plan, device, world=world)
        if begun and trainer.resume() and world.first:
            print(f"resumed after step {trainer.steps}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        history = trainer.fit(_say if world.first else None)
        accuracy = {name: trainer.evaluate(part)[1] for name, part in (("train", data.again), ("test", data.test))}
        if not world.first:
            return
        keep_vocabulary(data.folder, args.output)
        _leave(args, recipe, data, model, trainer, {
            "base": f"random weights of seed {args.seed}, frozen" if weights is None else str(weights),
            "model": size, "weights": str(weights or RANDOM), "weights_sha256": digest, "length": data.length,
            "plain_steps_because": trainer.step.plain, "train_accuracy": accuracy["train"],
            "valid_accuracy": history[-1]["valid_accuracy"], "test_accuracy": accuracy["test"],
            "total_seconds": round(time.perf_counter() - began, 2)})


@dataclass
class _Data:
    folder: Path
    digest: str
    length: int  # tokens per message
    train: Batches
    again: Batches  # all training messages in order, for the accuracy on them
    valid: Batches
    test: Batches


def _load(args: argparse.Namespace, recipe: Recipe, world: parallel.World, device: torch.device) -> _Data:
    folder = locate(args.data, "spam", *(["gpt2"] if args.data == "auto" else []))
    encoding = _encoding(args.data, folder)
    paths = {name: folder / "spam" / f"{name}.parquet" for name in ("train", "valid", "test")}
    train = SpamDataset(paths["train"], encoding, limit=args.train_samples)
    valid = SpamDataset(paths["valid"], encoding, train.length)
    test = SpamDataset(paths["test"], encoding, train.length, args.test_samples)
    if len(train) < recipe.batch_size * world.size:
        raise UserError(f"{paths['train']}: {len(train)} messages do not fill one batch of "
                        f"{recipe.batch_size * world.size}")
    digest = hashlib.sha256()
    for part in (train, valid, test):
        digest.update(part.inputs.numpy())
        digest.update(part.labels.numpy())

    def batches(part: SpamDataset, seed: int | None = None) -> Batches:
        return Batches(len(part), part.__getitem__, recipe.batch_size, seed, seed is not None, device, world)

    if world.first:
        print(f"{len(train):,} + {len(valid):,} + {len(test):,} messages of {train.length} tokens", flush=True)
    return _Data(folder, digest.hexdigest(), train.length, batches(train, args.seed), batches(train), batches(valid),
                 batches(test))


def _encoding(data: str, folder: Path):
    """GPT-2's encoding; its single bytes for the sample, which has to do without files and network."""
    return byte_encoding() if data == "sample" else gpt2_encoding(folder)


def _adapt(model: GPT2, rank: int, alpha: float, impl: str) -> None:
    fastlora.inject(model, r=rank, lora_alpha=alpha, target_modules="all-linear", layer_class=reports.LAYERS[impl])


def _store_frozen(model: GPT2, dtype: torch.dtype) -> None:
    """Keep the frozen linear weights in the dtype that autocast would cast them to at every use."""
    for layer in model.modules():
        if isinstance(layer, FusedLoRALinear):
            layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)


def _leave(args, recipe: Recipe, data: _Data, model: GPT2, trainer: Trainer, results: dict) -> None:
    """Write everything that the finished run leaves; the report last, since it says that the run is finished."""
    folder, device = args.output, trainer.device
    fastlora.save_adapter(model, folder)
    reports.write_history(folder, trainer.history)
    title = f"Spam, {results['model']}, {args.impl}: {results['test_accuracy']:.1%} on test"
    plot_history(folder / "curves.png", trainer.history, title)
    counts = reports.parameters(model)
    size = (folder / "adapter_model.safetensors").stat().st_size
    path = "eager"
    if args.impl == "fused":
        layer = model.blocks[0].attention.query
        x = torch.zeros(recipe.batch_size, data.length, layer.in_features, device=device, dtype=layer.weight.dtype)
        path = fastlora.explain(layer, x).path
    tokens = len(data.train) * data.train.batch_size * data.length * recipe.epochs
    reports.write_report(folder, {
        "task": "spam", "impl": args.impl, "path": path, "device": reports.device_name(device),
        "dataset": args.data if args.data in ("sample", "auto") else str(data.folder),
        "batches": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        **asdict(recipe), **counts, "adapter_bytes": size, "train_seconds": round(trainer.seconds, 3),
        "tokens_per_second": round(tokens / max(trainer.seconds, 1e-9)),
        "peak_memory_bytes": reports.peak_memory(device), **results, "precision": trainer.plan.precision,
        "accumulate": trainer.plan.accumulate, "processes": trainer.world.size, "seed": args.seed,
        "versions": reports.versions()})
    print(f"base: {results['base']}")
    print(reports.saving(counts, size))
    print(f"accuracy: train {results['train_accuracy']:.2%}, valid {results['valid_accuracy']:.2%}, test "
          f"{results['test_accuracy']:.2%}; trained {trainer.seconds:.1f} s, {results['total_seconds']:.1f} s in all; "
          f"everything is in {folder}")


def load_predictor(run: Path) -> Callable[[list[str]], list[tuple[str, float]]]:
    """A function that labels messages, (label, probability) each, from a finished run's folder.

    Raises UserError when a file is missing or damaged, or the base weights are no longer where they were.
    """
    report = reports.read_report(run)
    length, rank = reports.count_in(run, report, "length", LONGEST), reports.count_in(run, report, "rank", MOST_RANK)
    size = report.get("model")
    if not isinstance(size, str) or size not in CONFIGS:
        raise UserError(f"{run / REPORT}: damaged, its model is {shown(size)}, not one of {', '.join(CONFIGS)}")
    weights = weights_of(run, report)
    encoding = _encoding(report.get("dataset"), run)
    model = GPT2(CONFIGS[size])
    if weights is not None:
        gpt2_weights.load(model, weights)
    kept_base(model, weights, run)
    _adapt(model, rank, 1.0, "fused")
    fastlora.load_adapter(model, run)
    model.eval()

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[tuple[str, float]]:
        chances, classes = model(encode(texts, encoding, length)).softmax(-1).max(-1)
        return [(LABELS[c], float(p)) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    return predict


def _say(row: dict) -> None:
    from tqdm import tqdm

    tqdm.write(f"epoch {row['epoch']:.2f}, step {row['step']}: loss {row['train_loss']:.4f}, validation loss "
               f"{row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}")
