"""`fastlora train distilbert`: the Hugging Face tutorial, complete: a transformer, PEFT's LoRA, the Trainer.

Tokenise, classify sequences, `get_peft_model`, `Trainer`, curves, save, load, predict. With `--impl fused` the one line
`fastlora.peft.patch(model)` comes after `get_peft_model`; with `--impl eager` everything is stock PEFT.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

import fastlora.peft
from fastlora.errors import UserError, shown
from fastlora.finetune import hub_model, parallel
from fastlora.finetune import report as reports
from fastlora.finetune.data import random_split, read_texts
from fastlora.finetune.files import REPORT, run_folder
from fastlora.finetune.hub_model import LABELS, quietly, readable, shortened
from fastlora.finetune.hub_trainer import TokenDataset, make_trainer, texts_digest
from fastlora.finetune.locate import locate
from fastlora.finetune.options import pick_device, positive, whole
from fastlora.finetune.plots import plot_history

HELP = "sentiment of film reviews with DistilBERT (or any sequence classifier of transformers), PEFT and the Trainer"
MODEL = "distilbert-base-uncased"
TARGETS = {"distilbert": ["q_lin"], "bert": ["query", "value"]}  # by model_type; PEFT's own table for the others
DEFAULTS = {"epochs": 2, "rank": 4, "alpha": 32.0, "batch_size": 32, "lr": 1e-3}


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; lora_dropout as `dropout`, lengths in tokens."""

    model: str
    target_modules: tuple[str, ...]
    max_length: int
    dropout: float
    epochs: int
    rank: int
    alpha: float
    batch_size: int
    lr: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program alone."""
    parser.add_argument("--model", default=MODEL, metavar="NAME|DIR", help=f"hub name or folder (default {MODEL})")
    parser.add_argument("--max-length", type=whole(8, 65536), default=512, metavar="N",
                        help="tokens a review is cut at (default 512)")
    parser.add_argument("--dropout", type=_probability, default=0.01, metavar="P", help="lora_dropout (default 0.01)")
    parser.add_argument("--target-modules", nargs="+", metavar="NAME",
                        help="the layers to adapt (default: by architecture; q_lin for DistilBERT)")
    parser.add_argument("--show-tokens", action="store_true", help="print the tokens of the first review")


def train(args: argparse.Namespace) -> None:
    """Fine-tune, test, save, load and predict, leaving everything in `args.output`; `args` as the flags."""
    device = pick_device(args.device)
    if device.type == "cuda" and "RANK" not in os.environ:
        torch.cuda.set_device(device.index or 0)  # it takes no `cuda` without a number
    recipe = _recipe(args)
    settings = {"task": "distilbert", "data": args.data, "impl": args.impl, **vars(recipe), "seed": args.seed,
                "device": device.type, "train_samples": args.train_samples, "test_samples": args.test_samples,
                "processes": int(os.environ.get("WORLD_SIZE", "1"))}
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that train together, one writes
    held = run_folder(args.output, settings, args.resume) if first else contextlib.nullcontext()
    with held as begun, _together():
        if args.resume and (args.output / REPORT).exists():
            print(f"{args.output}: the run is finished already")
            return
        _train(args, recipe, device, first, bool(begun))


def _train(args: argparse.Namespace, recipe: Recipe, device: torch.device, first: bool, begun: bool) -> None:
    texts = _texts(locate(args.data, "imdb"), args)
    set_seed(args.seed)
    what = f"--model {args.model}"
    tokenizer, model = hub_model.load_model(recipe.model, what)
    run = {"data": texts_digest(texts), "base model": hub_model.digest(recipe.model, tokenizer, what)}
    _check_targets(model, recipe.target_modules)
    if args.show_tokens and first:
        _show(tokenizer, texts["train"][0][0], recipe.max_length)
    data = {name: TokenDataset(tokenizer, *rows, recipe.max_length) for name, rows in texts.items()}
    try:
        model = get_peft_model(model, _lora_config(recipe))
    except ValueError as error:  # PEFT's, for target modules that the model has not
        raise UserError(f"--target-modules {' '.join(recipe.target_modules)}: {shortened(error)}") from None
    if args.impl == "fused":
        fastlora.peft.patch(model)
    counts = parameters(model)
    if first:
        print(f"trainable: {counts['trainable_parameters']:,} of {counts['total_parameters']:,} parameters")
    trainer = make_trainer(model, tokenizer, data, args, recipe, device, run)
    world = parallel.World(trainer.args.process_index, trainer.args.world_size)
    trainer.fit(resume=parallel.told(begun, world, trainer.args.device))  # the first process alone knows the folder
    test = trainer.predict(data["test"], metric_key_prefix="test").metrics
    if first:
        _leave(args, recipe, data, model, trainer, counts, test["test_accuracy"])
        print(f"test accuracy {test['test_accuracy']:.2%} on {len(data['test']):,} reviews; trained "
              f"{trainer.seconds:.1f} s; everything is in {args.output}")
        few = texts["test"][0][:3]
        for text, (label, probability) in zip(few, load_predictor(args.output)(few), strict=True):
            print(f"  loaded and predicted: {label} {probability:.3f}  {' '.join(text.split())[:60]}")


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Ends the process group that the Trainer begins under torchrun: its threads abort a process that just exits.

    All processes end it at one time, and after the model that speaks through it: else one may wait for ever.
    """
    try:
        yield
    except BaseException:  # the others may be anywhere
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        raise
    gc.collect()
    parallel.stop()


def load_predictor(run: Path) -> Callable[[list[str]], list[tuple[str, float]]]:
    """A function that labels reviews, (label, probability) each, from a finished run's folder.

    Raises UserError when the run is not finished or damaged, or the model that it adapts is not to be had.
    """
    report = reports.read_report(run)
    name, max_length, impl = (report.get(key) for key in ("model", "max_length", "impl"))
    if not (isinstance(name, str) and type(max_length) is int and impl in ("fused", "eager")):
        raise UserError(f"{run / REPORT}: damaged, it names no model, max_length or impl")
    what = f"{run}: its base model {shown(name)}"
    with quietly():
        name = hub_model.located(name, what)
        most = hub_model.longest(hub_model.load_config(name, what))
        if not 1 <= max_length <= most:
            raise UserError(f"{run / REPORT}: damaged, its max_length is {max_length}, and the model has {most}")
        tokenizer, model = hub_model.load_model(name, what)
        # earlier versions left no digest to compare with
        if "base_sha256" in report and hub_model.digest(name, tokenizer, what) != report["base_sha256"]:
            raise UserError(f"{what} is not the one that the run adapted: its weights, words or settings were changed")
        model = hub_model.load_adapter(model, run)
    if impl == "fused":
        fastlora.peft.patch(model)
    model.eval()

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[tuple[str, float]]:
        texts = [readable(text, max_length) for text in texts]
        batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_token_type_ids=False,
                          return_tensors="pt")
        chances, classes = model(**batch).logits.float().softmax(-1).max(-1)
        return [(LABELS[c], float(p)) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    return predict


def parameters(model) -> dict[str, int]:
    """The report's counts: what trains, everything, the adapter's, and its layers' weights."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name),
        "full_layer_parameters": sum(layer.get_base_layer().weight.numel() for layer in layers),
    }


def _recipe(args: argparse.Namespace) -> Recipe:
    what = f"--model {args.model}"
    name = hub_model.located(args.model, what)
    config = hub_model.load_config(name, what)
    targets = args.target_modules or TARGETS.get(config.model_type) or PEFT_TARGETS.get(config.model_type)
    if not targets:
        raise UserError(f"{what}: no default target modules for a {config.model_type!r}; "
                        "name them by --target-modules")
    given = {key: getattr(args, key) if getattr(args, key) is not None else value for key, value in DEFAULTS.items()}
    return Recipe(name, tuple(targets), min(args.max_length, hub_model.longest(config)), args.dropout, **given)


def _lora_config(recipe: Recipe) -> LoraConfig:
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=recipe.rank, lora_alpha=recipe.alpha,
                      lora_dropout=recipe.dropout, target_modules=list(recipe.target_modules))


def _check_targets(model, names: tuple[str, ...]) -> None:
    """Each name must be that of a linear layer, or its end: PEFT passes over the others as long as one is found."""
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for name in names:
        if not any(f".{layer}".endswith(f".{name}") for layer in linear):
            there = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear}))
            raise UserError(f"--target-modules {name}: the model has no such linear layer; names there: {there}")


def _texts(folder: Path, args: argparse.Namespace) -> dict[str, tuple[list[str], list[int]]]:
    texts, labels = read_texts(folder / "imdb/train.parquet", len(LABELS), args.train_samples)
    if len(texts) < 2:
        raise UserError(f"{folder}/imdb/train.parquet: at least 2 reviews are needed, to train and to validate")
    parts = zip(("train", "valid"), random_split(len(texts), args.seed), strict=True)
    chosen = {name: ([texts[i] for i in rows], [labels[i] for i in rows]) for name, rows in
              ((name, rows.tolist()) for name, rows in parts)}
    return {**chosen, "test": read_texts(folder / "imdb/test.parquet", len(LABELS), args.test_samples)}


def _show(tokenizer, text: str, max_length: int) -> None:
    encoded = tokenizer(text, truncation=True, max_length=max_length)
    for name, values in (("text", text), ("tokens", tokenizer.convert_ids_to_tokens(encoded["input_ids"])),
                         ("input_ids", encoded["input_ids"]), ("attention_mask", encoded["attention_mask"])):
        print(f"{name}: {values}")


def _leave(args, recipe: Recipe, data, model, trainer, counts, accuracy: float) -> None:
    """Write everything that the finished run leaves; the report last, since it says that the run is finished."""
    folder, history = args.output, trainer.history()
    hub_model.save_adapter(model, folder)
    reports.write_history(folder, history)
    plot_history(folder / "curves.png", history, f"{Path(recipe.model).name}, {args.impl}: {accuracy:.1%} on test")
    layers = fastlora.peft.report(model)
    how = sorted(set(map(str, layers.values())))
    if args.impl == "fused":
        print(f"{layers.fused_calls:,} fused calls ({', '.join(how)}), {layers.fallback_calls:,} by PEFT's own forward")
    size = (folder / "adapter_model.safetensors").stat().st_size
    reports.write_report(folder, {
        "task": "distilbert", "impl": args.impl, "path": ", ".join(how) if args.impl == "fused" else "eager",
        "device": reports.device_name(trainer.args.device), "dataset": args.data, **vars(recipe),
        "base_sha256": trainer.run["base model"],
        "batches": {name: -(-len(rows) // recipe.batch_size) for name, rows in data.items()}, **counts,
        "adapter_bytes": size, "train_seconds": round(trainer.seconds, 3),
        "tokens_per_second": round(data["train"].tokens * recipe.epochs / max(trainer.seconds, 1e-9)),
        "peak_memory_bytes": reports.peak_memory(trainer.args.device),
        "valid_accuracy": trainer.best(), "test_accuracy": accuracy, "fused_calls": layers.fused_calls,
        "fallback_calls": layers.fallback_calls, "seed": args.seed, "versions": reports.versions()})


def _probability(text: str) -> float:
    value = 0.0 if text.strip() in ("0", "0.0") else positive(text)
    if value >= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value
