"""The one training loop of the programs here: `Trainer.fit`. Epochs of steps, evaluation, checkpoints.

Nothing in the loop knows what a model, an adapter or an optimiser is: `Step` does, and what `Trainer.state` names is
what a checkpoint holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.errors import UserError, WorkError
from fastlora.finetune.checkpoint import read_checkpoint, write_checkpoint
from fastlora.finetune.data import Batches
from fastlora.finetune.parallel import ALONE, World
from fastlora.finetune.step import Step, StepSettings, autocast, tally


@dataclass(frozen=True)
class Settings(StepSettings):
    """How long to train, and how each step is taken.

    Attributes:
        epochs: passes over the training batches.
        every: evaluate, and write the checkpoint, every so many optimiser steps, besides each epoch's end.
        accumulate: batches whose gradients are summed into one optimiser step.
        checkpoint: the checkpoint's path; None keeps none.
        run: a digest of all that decides the result; a checkpoint with another is refused.
        seed: of what training draws (dropout).
    """

    epochs: int = 1
    every: int | None = None
    accumulate: int = 1
    checkpoint: Path | None = None
    run: str = ""
    seed: int = 0


class Trainer:
    """Trains the parameters of `model` that ask for a gradient, by cross-entropy on `model(*inputs)`.

    Args:
        model: logits (batch, classes) of a batch's inputs.
        optimiser: over the trained parameters.
        train, valid: their batches.
        settings: how long and how.
        scheduler: stepped at each epoch's end.
        world: the processes that train together; the first one's start is everyone's.
        progress: show a progress bar.

    Attributes:
        step: takes one optimiser step on a list of batches; `step.plain` says why it is no CUDA graph, if it is none.
        history: a row per evaluation: epoch (a fraction within an epoch), step, train_loss, train_accuracy,
            valid_loss, valid_accuracy, learning_rate, seconds (of training so far, evaluation left out).
        epoch, position, steps: epochs done, batches done in this epoch, optimiser steps done in all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        train: Batches,
        valid: Batches | None,
        settings: Settings,
        scheduler=None,
        world: World = ALONE,
        progress: bool = True,
    ):
        self.model, self.optimiser, self.scheduler = model, optimiser, scheduler
        self.train, self.valid, self.settings, self.world = train, valid, settings, world
        self.step = Step(model, optimiser, settings, world)
        self.device, self.progress = self.step.device, progress and world.first
        self.history: list[dict] = []
        self.epoch = self.position = self.steps = 0
        self.seconds = 0.0

    def fit(self, on_row: Callable[[dict], None] | None = None) -> list[dict]:
        """Train to the last epoch from wherever the trainer stands; returns `history`."""
        settings = self.settings
        self.model.train()
        while self.epoch < settings.epochs:
            batches = self.train.epoch(self.epoch, self.position)
            with self._bar() as bar:
                self._seed()
                sums, rows, began = 0, 0, self._now()
                while group := list(islice(batches, settings.accumulate)):
                    sums += self.step(group)
                    rows += sum(self.train.rows(self.position + i) for i in range(len(group)))
                    self.position += len(group)
                    self.steps += 1
                    bar.update(len(group))
                    last = self.position == len(self.train)
                    if last or (settings.every and self.steps % settings.every == 0):
                        self.seconds += self._now() - began
                        self._record(sums, rows, bar, on_row)
                        if not last:
                            self.save()
                            self._seed()
                        sums, rows, began = 0, 0, self._now()
            if self.scheduler is not None:
                self.scheduler.step()
            self.epoch, self.position = self.epoch + 1, 0
            self.save()
        return self.history

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """(mean cross-entropy, accuracy between 0 and 1) over `batches`, the model in evaluation mode.

        Raises WorkError when the cross-entropy is not finite.
        """
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for *inputs, labels in batches.shared():
            with autocast(self.device, self.settings.precision):
                logits = self.model(*inputs)
            sums += tally(F.cross_entropy(logits.float(), labels), logits, labels)
        self.model.train(training)
        loss, correct = self.world.add(sums).tolist()
        self._check(loss)
        return loss / batches.size, correct / batches.size

    def state(self) -> dict:
        """All that training goes on from: what a checkpoint holds."""
        return {
            "run": self.settings.run,
            "processes": self.world.size,
            "model": {name: p for name, p in self.model.named_parameters() if p.requires_grad},
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            **{key: getattr(self, key) for key in ("epoch", "position", "steps", "seconds", "history")},
        }

    def save(self) -> None:
        """Write the checkpoint, if one is kept; WorkError when a trained parameter is not finite."""
        if not torch.stack([p.isfinite().all() for p in self.step.trained]).all():
            self._check(math.nan)
        if self.settings.checkpoint is not None and self.world.first:
            write_checkpoint(self.settings.checkpoint, self.state())

    def resume(self) -> bool:
        """Go back to the checkpoint; False when there is none. UserError when it is damaged or another run's."""
        path, now = self.settings.checkpoint, self.state()
        if path is None or not path.exists():
            return False
        then = read_checkpoint(path)
        if any(then.get(key) != now[key] for key in ("run", "processes")):
            raise UserError(f"{path}: a checkpoint of a run with other settings; delete it to start again")
        if _form(then.get("model")) != _form(now["model"]) or any(then.get(key) is None for key in ("epoch", "steps")):
            raise UserError(f"{path}: a checkpoint of another model (its trained parameters differ)")
        then["optimiser"]["state"] = {int(index): value for index, value in then["optimiser"]["state"].items()}
        rates = [group["lr"] for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(then["optimiser"])
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):  # the very tensor that a captured step reads
                group["lr"] = rate.copy_(group["lr"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(then["scheduler"])
        if then["scaler"]:
            self.step.scaler.load_state_dict(then["scaler"])
        with torch.no_grad():
            for name, parameter in now["model"].items():
                parameter.copy_(then["model"][name])
        for key in ("epoch", "position", "steps", "seconds", "history"):
            setattr(self, key, then[key])
        return True

    def _record(self, sums: Tensor, rows: int, bar, on_row) -> None:
        loss, correct = sums.tolist()
        self._check(loss)
        valid_loss, valid_accuracy = self.evaluate(self.valid) if self.valid is not None else (None, None)
        row = {
            "epoch": round(self.epoch + self.position / len(self.train), 6),
            "step": self.steps,
            "train_loss": loss / rows,
            "train_accuracy": correct / rows,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "learning_rate": float(f"{self.optimiser.param_groups[0]['lr']:.12g}"),  # 0.01, not 0.010000000000000002
            "seconds": round(self.seconds, 4),
        }
        self.history.append(row)
        accuracy = row["train_accuracy"] if valid_accuracy is None else valid_accuracy
        bar.set_postfix(loss=f"{row['train_loss']:.4f}", accuracy=f"{accuracy:.4f}")
        if on_row is not None:
            on_row(row)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            epoch = min(self.epoch + 1, self.settings.epochs)
            raise WorkError(f"training diverged in epoch {epoch}: the loss is {loss}; a smaller --lr may help")

    def _seed(self) -> None:
        """A seed of its own for what follows, so that no checkpoint holds a generator's state."""
        torch.manual_seed(((self.settings.seed * 1_000_003 + self.steps) * self.world.size + self.world.rank) % 2**63)

    def _now(self) -> float:
        if self.device.type == "cuda":  # which works on after it was asked to
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _bar(self):
        from tqdm import tqdm

        return tqdm(
            total=len(self.train), initial=self.position, desc=f"epoch {self.epoch + 1}/{self.settings.epochs}",
            unit="batch", disable=None if self.progress else True, mininterval=0.2,
        )  # fmt: skip


def _form(tensors: object) -> dict | None:
    if not isinstance(tensors, dict):
        return None
    return {name: (t.shape, t.dtype) if isinstance(t, Tensor) else None for name, t in tensors.items()}
