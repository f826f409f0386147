"""`fastlora train distilbert`: the Hugging Face tutorial, complete: a transformer, PEFT's LoRA, the Trainer.

Tokenise, classify sequences, `get_peft_model`, `Trainer`, curves, save, load, predict. With `--impl fused` the one line
`fastlora.peft.patch(model)` comes after `get_peft_model`; with `--impl eager` everything is stock PEFT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

import fastlora.peft
from fastlora.errors import UserError, WorkError, shown
from fastlora.files import write_json
from fastlora.finetune import hub, parallel
from fastlora.finetune import run as runs
from fastlora.finetune.data import data_digest, locate, random_split, read_texts
from fastlora.finetune.hub import LABELS
from fastlora.finetune.options import add_shared, complete, number, whole

CHECKPOINTS = "checkpoints"  # the Trainer's, in the run's folder until the run is finished
TARGETS = {"distilbert": ["q_lin"], "bert": ["query", "value"]}  # by model_type; PEFT's own table for the others
SPLIT_SEED = 0
RECIPE = {
    "model": "distilbert-base-uncased",
    "target_modules": (),  # by architecture
    "max_length": 512,  # tokens
    "dropout": 0.01,  # PEFT's lora_dropout
    "epochs": 2,
    "rank": 4,
    "alpha": 32.0,
    "batch_size": 32,
    "lr": 1e-3,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program."""
    add_shared(parser, RECIPE)
    add = parser.add_argument
    add("--model", metavar="NAME|DIR", help=f"hub name or folder (default {RECIPE['model']})")
    add("--max-length", type=whole(8, 65536), metavar="N", help="tokens a review is cut at (default 512)")
    below_one = number(float, 0, 1 - 1e-9, "at least 0 and below 1")
    add("--dropout", type=below_one, metavar="P", help="lora_dropout (default 0.01)")
    targets = "the layers to adapt (default: by architecture; q_lin for DistilBERT)"
    add("--target-modules", nargs="+", metavar="NAME", help=targets)
    add("--show-tokens", action="store_true", help="print the tokens of the first review")


@parallel.joined
def train(args: argparse.Namespace, device: torch.device) -> None:
    """Fine-tune, test, save, load and predict, leaving everything in `args.output`; `args` as the flags."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # it takes no `cuda` without a number
    set_seed(args.seed)  # the head's start
    complete(args, RECIPE)
    what = f"--model {args.model}"
    tokenizer, model, digest = hub.load_model(args.model, what)
    args.model, kind = model.name_or_path, model.config.model_type
    args.target_modules = args.target_modules or TARGETS.get(kind) or PEFT_TARGETS.get(kind)
    if not args.target_modules:
        raise UserError(f"{what}: no default target modules for a {kind!r}; name --target-modules")
    _check_targets(model, args.target_modules)
    args.max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    settings = runs.settings_of(args, weights_sha256=digest, device=device.type, processes=parallel.size(),
                                data_sha256=data_digest(args.data, "imdb"))  # fmt: skip
    with runs.run_folder(args.output, settings, args.resume, device) as unfinished:
        if not unfinished:
            return
        folder, texts = args.output, _texts(locate(args.data, "imdb"), args)
        data = {name: _rows(tokenizer, *rows, args.max_length) for name, rows in texts.items()}
        if parallel.first() and args.show_tokens:
            text = texts["train"][0][0]
            encoded = tokenizer(text, truncation=True, max_length=args.max_length)
            print(f"text: {text}\ntokens: {tokenizer.convert_ids_to_tokens(encoded['input_ids'])}")
            print(f"input_ids: {encoded['input_ids']}\nattention_mask: {encoded['attention_mask']}")
        model = get_peft_model(model, LoraConfig(
            task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout,
            target_modules=list(args.target_modules)))  # fmt: skip
        if args.impl == "fused":
            fastlora.peft.patch(model)
        counts = runs.counts(model)
        if parallel.first():
            print(f"trainable: {counts['trainable_parameters']:,} of {counts['total_parameters']:,} parameters")
        trainer = make_trainer(args, model, tokenizer, data, device)
        trainer.fit()
        accuracy = trainer.predict(data["test"], metric_key_prefix="test").metrics["test_accuracy"]
        if not parallel.first():
            return

        history = [entry["row"] for entry in trainer.state.log_history if "row" in entry]
        tokens = args.epochs * sum(len(row["input_ids"]) for row in data["train"])
        hub.save_adapter(model, folder)
        layers = fastlora.peft.report(model)
        how = ", ".join(sorted(set(map(str, layers.values()))))
        if args.impl == "fused":
            print(f"{layers.fused_calls:,} fused calls ({how}), {layers.fallback_calls:,} by PEFT's own forward")
        title = f"{Path(args.model).name}, {args.impl}: {accuracy:.1%} on test"
        runs.leave(folder, history, title, trainer.args.device, {
            **settings, "path": how if args.impl == "fused" else "eager", "dataset": args.data,
            "batches": {name: -(-len(rows) // args.batch_size) for name, rows in data.items()}, **counts,
            "train_seconds": round(trainer.seconds, 3), "tokens_per_second": round(tokens / max(trainer.seconds, 1e-9)),
            "valid_accuracy": max(row["valid_accuracy"] for row in history), "test_accuracy": accuracy,
            "fused_calls": layers.fused_calls, "fallback_calls": layers.fallback_calls})  # fmt: skip
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        text = texts["test"][0][0]
        ((label, probability),) = load_predictor(folder)([text])
        print(f"loaded and predicted: {label} {probability:.3f}  {' '.join(text.split())[:60]}")


class HubTrainer(Trainer):
    """The Trainer, with training accuracy and a row of history at each evaluation, which its `seconds` leave out."""

    def fit(self) -> None:
        """Train, from the last whole checkpoint on if there is one; the best epoch's weights are left in the model."""
        folder, last, self.seconds = Path(self.args.output_dir), None, 0.0
        for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])):
            with contextlib.suppress(OSError, ValueError):  # cut while it was written: the state comes last
                last, then = path, json.loads((path / "trainer_state.json").read_text())
        if last:  # the run's folder may have another name by now
            self.seconds = then["log_history"][-1]["row"]["seconds"]
            then["best_model_checkpoint"] = str(folder / Path(then["best_model_checkpoint"]).name)
            write_json(last / "trainer_state.json", then)
        self._tally = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # loss, correct, rows
        self._began = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=last and str(last))
        except BaseException:
            print(file=sys.stderr)  # what is said of an error is to begin a line, not to follow a bar
            with contextlib.suppress(OSError):  # it holds checkpoints, or nothing is left of the run
                folder.rmdir()
            raise

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The Trainer's, and what it came to in training added up."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            labels, logits = inputs["labels"], outputs["logits"].detach().float()
            mean, correct = nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()
            self._tally += torch.stack([mean.double() * len(labels), correct, correct.new_full((), len(labels))])
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """The Trainer's, and a row of history in its state. WorkError for a run that has diverged."""
        self.seconds += time.perf_counter() - self._began
        loss, correct, rows = self.accelerator.reduce(self._tally, "sum").tolist()
        metrics = super().evaluate(*args, **kwargs)
        row = {
            "epoch": round(self.state.epoch, 6),
            "step": self.state.global_step,
            "train_loss": loss / rows,
            "train_accuracy": correct / rows,
            "valid_loss": float(metrics["eval_loss"]),
            "valid_accuracy": float(metrics["eval_accuracy"]),
            "learning_rate": float(self._get_learning_rate()),
            "seconds": round(self.seconds, 4),
        }
        trained = torch.stack([p.isfinite().all() for p in self.model.parameters() if p.requires_grad]).all()
        if not (trained and all(map(math.isfinite, row.values()))):
            raise WorkError(f"training diverged in epoch {row['epoch']:g}: the loss or the adapter is not finite; "
                            "a smaller --lr may help")  # fmt: skip
        self.state.log_history[-1]["row"] = row
        self._tally.zero_()
        self._began = time.perf_counter()
        return metrics

    def _save_checkpoint(self, *args, **kwargs) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (SafetensorError, RuntimeError) as error:  # of a full disk; torch's own is one of the latter
            raise WorkError(f"{self.args.output_dir}: cannot be written ({shown(str(error))})") from None


def make_trainer(args: argparse.Namespace, model, tokenizer, data: dict[str, list], device) -> HubTrainer:
    """The trainer of one run on `data`'s "train" and "valid"; the best checkpoint is kept."""
    named = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__  # transformers 5
    grouped = {"train_sampling_strategy": "group_by_length"} if named else {"group_by_length": True}
    settings = TrainingArguments(
        output_dir=str((args.output / CHECKPOINTS).resolve()), num_train_epochs=args.epochs, learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy", seed=args.seed, data_seed=args.seed,
        use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda", report_to="none",
        ddp_backend=("gloo" if device.type == "cpu" else "nccl") if parallel.size() > 1 else None,
        ddp_find_unused_parameters=False if parallel.size() > 1 else None, **grouped,
    )  # fmt: skip
    if parallel.size() == 1 and device.type == "cuda":
        settings._n_gpu = 1  # --device names one; the Trainer would spread over all that it sees

    def accuracy(prediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return HubTrainer(model=model, args=settings, train_dataset=data["train"], eval_dataset=data["valid"],
                      data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy)  # fmt: skip


def load_predictor(run: Path) -> runs.Predictor:
    """What labels reviews by the finished run in a folder; UserError when a file of it or its base is not to be had."""
    report = runs.read_report(run)
    what = f"{run}: its base model {shown(report['model'])}"
    logging.set_verbosity_error()  # no report of weights that the adapter brings
    logging.disable_progress_bar()
    tokenizer, model, digest = hub.load_model(report["model"], what)
    if report.get("weights_sha256") not in (None, digest):  # earlier versions left none
        raise UserError(f"{what} is not the one that the run adapted: its weights were changed")
    fastlora.load_adapter(model, run).eval()

    def logits(texts: list[str]) -> torch.Tensor:
        return model(**tokenizer(texts, truncation=True, max_length=report["max_length"], padding=True,
                                 return_token_type_ids=False, return_tensors="pt")).logits  # fmt: skip

    return runs.predictor(LABELS, logits)


def _check_targets(model, names: tuple[str, ...]) -> None:
    """Each name must be that of a linear layer, or its end: PEFT passes over the others as long as one is found."""
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for name in names:
        if not any(layer.endswith(f".{name}") for layer in linear):
            there = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear}))
            raise UserError(f"--target-modules {name}: the model has no such linear layer; names there: {there}")


def _texts(folder: Path, args: argparse.Namespace) -> dict[str, tuple[list[str], list[int]]]:
    texts, labels = read_texts(folder / "imdb/train.parquet", len(LABELS), args.train_samples, least=2)
    parts = {"test": read_texts(folder / "imdb/test.parquet", len(LABELS), args.test_samples)}
    for name, rows in zip(("train", "valid"), random_split(len(texts), SPLIT_SEED), strict=True):
        parts[name] = [texts[i] for i in rows], [labels[i] for i in rows]
    return parts


def _rows(tokenizer, texts: list[str], labels: list[int], max_length: int) -> list[dict]:
    """The texts' token ids, masks and labels, not padded, by length: neighbours in evaluation need little padding."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_token_type_ids=False)
    parts = zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in parts]
    return sorted(rows, key=lambda row: -len(row["input_ids"]))
