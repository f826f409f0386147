"""transformers' Trainer as `fastlora train distilbert` uses it: what it reads, how it is set up, and its history."""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import fields

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, TrainingArguments

from fastlora.errors import WorkError
from fastlora.finetune.files import CHECKPOINT
from fastlora.finetune.hub_checkpoint import COLUMNS, CheckpointedTrainer
from fastlora.finetune.hub_model import readable


class TokenDataset(Dataset):
    """Tokenised texts: rows of input_ids, attention_mask (lists, not padded) and labels.

    Sorted by length, so that the neighbours of an evaluation batch need little padding; training batches are drawn by
    the Trainer's own sampler of similar lengths.
    """

    def __init__(self, tokenizer, texts: list[str], labels: list[int], max_length: int):
        texts = [readable(text, max_length) for text in texts]
        encoded = tokenizer(texts, truncation=True, max_length=max_length, return_token_type_ids=False)
        rows = zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
        self.rows = [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in rows]
        self.rows.sort(key=lambda row: -len(row["input_ids"]))
        self.tokens = sum(len(row["input_ids"]) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def texts_digest(texts: dict[str, tuple[list[str], list[int]]]) -> str:
    """The sha256 of all texts and labels, by the names of the sets."""
    summed = hashlib.sha256()
    for name, (lines, labels) in texts.items():
        summed.update(f"{name} {len(lines)} {labels}".encode())
        for line in lines:
            content = line.encode("utf-8", "surrogatepass")
            summed.update(len(content).to_bytes(8, "little") + content)
    return summed.hexdigest()


class HubTrainer(CheckpointedTrainer):
    """The Trainer, with the accuracy of the training batches and a row of history at each evaluation.

    Its `seconds` leave evaluation out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tally = torch.zeros(3, dtype=torch.float64)  # loss, correct rows, rows since the last evaluation
        self._began = None

    def training_step(self, *args, **kwargs):
        if self._began is None:
            self._began = time.perf_counter()
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
        """The Trainer's, and a row of history that is kept in its state, so that checkpoints hold it.

        Raises WorkError when training has diverged: nothing of such a run is kept.
        """
        now = time.perf_counter()
        self.seconds += now - (self._began or now)
        loss, correct, rows = self.accelerator.reduce(self._tally.to(self.args.device), "sum").tolist()
        metrics = super().evaluate(*args, **kwargs)
        if rows:
            numbers = (round(self.state.epoch, 6), self.state.global_step, loss / rows, correct / rows,
                       float(metrics["eval_loss"]), float(metrics["eval_accuracy"]), float(self._get_learning_rate()),
                       round(self.seconds, 4))
            row = dict(zip(COLUMNS, numbers, strict=True))
            whole = torch.stack([p.isfinite().all() for p in self.trained().values()]).all()  # one wait for the device
            if not (whole and all(map(math.isfinite, numbers))):
                raise WorkError(f"training diverged in epoch {row['epoch']:g}: the loss or the adapter is not finite; "
                                "a smaller --lr may help")
            if row["valid_accuracy"] > max((before["valid_accuracy"] for before in self.history()), default=-1.0):
                self.keep_best()
            self.state.log_history[-1]["row"] = row
        self._tally.zero_()
        self._began = time.perf_counter()
        return metrics

    def best(self) -> float:
        """The validation accuracy of the weights that training ended with: the best epoch's."""
        return max(row["valid_accuracy"] for row in self.history())


def make_trainer(
    model, tokenizer, data: dict[str, TokenDataset], args, recipe, device: torch.device, run: dict[str, str]
) -> HubTrainer:
    """The trainer of one run: batches of similar length, evaluation and a checkpoint at each epoch's end, best kept.

    Args:
        data: "train", "valid" and "test".
        args: the program's flags (output, seed).
        recipe: epochs, batch_size and lr.
        run: digests of what must be the same in a run that goes on.
    """
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}:  # transformers 5
        grouped = {"train_sampling_strategy": "group_by_length"}
    else:
        grouped = {"group_by_length": True}
    together = "RANK" in os.environ
    settings = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
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
        checkpoint=args.output / CHECKPOINT,
        run=run,
    )


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}
