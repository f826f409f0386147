"""transformers' Trainer as `fastlora train distilbert` uses it: what it reads, how it is set up, and its history."""

from __future__ import annotations

import os
import time
from dataclasses import fields

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

CHECKPOINTS = "checkpoints"


class TokenDataset(Dataset):
    """Tokenised texts: rows of input_ids, attention_mask (lists, not padded) and labels.

    Sorted by length, so that the neighbours of an evaluation batch need little padding; training batches are drawn by
    the Trainer's own sampler of similar lengths.
    """

    def __init__(self, tokenizer, texts: list[str], labels: list[int], max_length: int):
        encoded = tokenizer(texts, truncation=True, max_length=max_length, return_token_type_ids=False)
        rows = zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
        self.rows = [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in rows]
        self.rows.sort(key=lambda row: -len(row["input_ids"]))
        self.tokens = sum(len(row["input_ids"]) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class HubTrainer(Trainer):
    """The Trainer, with the accuracy of the training batches and a row of history at each evaluation.

    Attributes:
        seconds: of training so far, evaluation left out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tally = torch.zeros(3, dtype=torch.float64)  # loss, correct rows, rows since the last evaluation
        self._began, self.seconds = None, 0.0

    def training_step(self, *args, **kwargs):
        if self._began is None:
            self._began = time.perf_counter()
            rows = self.history()  # of the run that this one goes on with
            self.seconds = rows[-1]["seconds"] if rows else 0.0
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            with torch.no_grad():
                labels = inputs["labels"]
                logits = outputs["logits"]
                mean = torch.nn.functional.cross_entropy(logits.float(), labels)
                correct = (logits.argmax(-1) == labels).sum()
                part = torch.stack([mean.double() * len(labels), correct.double(), correct.new_full((), len(labels))])
                self._tally = self._tally.to(part.device) + part
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """The Trainer's, and a row of history that is kept in its state, so that checkpoints hold it."""
        now = time.perf_counter()
        self.seconds += now - (self._began or now)
        loss, correct, rows = self.accelerator.reduce(self._tally.to(self.args.device), "sum").tolist()
        metrics = super().evaluate(*args, **kwargs)
        if rows:
            self.state.log_history[-1]["row"] = {
                "epoch": round(self.state.epoch, 6), "step": self.state.global_step,
                "train_loss": loss / rows, "train_accuracy": correct / rows,
                "valid_loss": float(metrics["eval_loss"]), "valid_accuracy": float(metrics["eval_accuracy"]),
                "learning_rate": float(self._get_learning_rate()), "seconds": round(self.seconds, 4)}
        self._tally.zero_()
        self._began = time.perf_counter()
        return metrics

    def history(self) -> list[dict]:
        """A row per evaluation, with the columns of every program's `history.csv`."""
        return [entry["row"] for entry in self.state.log_history if "row" in entry]

    def best(self) -> float:
        """The validation accuracy of the weights that training ended with: the best epoch's."""
        return max(row["valid_accuracy"] for row in self.history())


def make_trainer(model, tokenizer, data: dict[str, TokenDataset], args, recipe, device: torch.device) -> HubTrainer:
    """The trainer of one run: batches of similar length, evaluation and a checkpoint at each epoch's end, best kept.

    Args:
        data: "train", "valid" and "test".
        args: the program's flags (output, seed).
        recipe: epochs, batch_size and lr.
    """
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}:  # transformers 5
        grouped = {"train_sampling_strategy": "group_by_length"}
    else:
        grouped = {"group_by_length": True}
    together = "RANK" in os.environ
    settings = TrainingArguments(
        output_dir=str(args.output / CHECKPOINTS),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        seed=args.seed,
        data_seed=args.seed,
        use_cpu=device.type == "cpu",
        ddp_backend=("gloo" if device.type == "cpu" else "nccl") if together else None,
        ddp_find_unused_parameters=False if together else None,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        **grouped,
    )
    if not together and device.type == "cuda":
        settings._n_gpu = 1  # --device names one; the Trainer would spread over all that it sees
    return HubTrainer(
        model=model,
        args=settings,
        train_dataset=data["train"],
        eval_dataset=data["valid"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_accuracy,
    )


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}
