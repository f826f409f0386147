"""The trainer of every program here: epochs of steps, evaluation, checkpoints. The whole loop is `Trainer.fit`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.errors import UserError, WorkError, shown
from fastlora.finetune import parallel
from fastlora.finetune.batches import Batches
from fastlora.finetune.checkpoint import alike, pack, read_checkpoint, unpack, write_checkpoint
from fastlora.finetune.clock import Clock
from fastlora.finetune.step import PRECISIONS, Step, StepSettings, autocast, tally

__all__ = ["PRECISIONS", "Plan", "Trainer"]


@dataclass(frozen=True)
class Plan:
    """How long to train and how each step is taken.

    Attributes:
        epochs: passes over the training batches.
        eval_every: evaluate on the validation batches every so many optimiser steps, besides each epoch's end.
        clip: largest norm of the gradient; None does not clip.
        accumulate: batches whose gradients are summed into one optimiser step.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        graph: on CUDA, capture the step once as a graph and replay it.
        compile: pass the model through torch.compile.
        checkpoint: the checkpoint's path; None keeps none.
        checkpoint_every: write it every so many optimiser steps, besides each epoch's end.
        run: a digest of all that decides the result; a checkpoint with another is refused.
        progress: show a progress bar.
    """

    epochs: int
    eval_every: int | None = None
    clip: float | None = None
    accumulate: int = 1
    precision: str = "float32"
    graph: bool = False
    compile: bool = False
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    run: str = ""
    progress: bool = True


class Trainer:
    """Trains the parameters of `model` that ask for a gradient, by cross-entropy on `model(*inputs)`.

    Args:
        model: logits (batch, classes) of a batch's inputs.
        optimiser: over the trained parameters.
        train, valid: their batches.
        plan: how long and how.
        device: the model's.
        scheduler: stepped at each epoch's end.
        world: the processes that train together; the first one's start is everyone's.

    Attributes:
        step: takes one optimiser step on a list of batches; `step.plain` says why it is no CUDA graph, if it is none.
        history: a row per evaluation: epoch (a fraction within an epoch), step, train_loss, train_accuracy,
            valid_loss, valid_accuracy, learning_rate, seconds (of training so far, evaluation left out).
        epoch, position, steps: epochs done, batches done in this epoch, optimiser steps done in all.
    """

    _COUNTS = ("epoch", "position", "steps", "seconds", "rows", "history")
    _ROW = ("epoch", "step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rate", "seconds")

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        train: Batches,
        valid: Batches | None,
        plan: Plan,
        device: torch.device,
        scheduler=None,
        world: parallel.World = parallel.ALONE,
    ):
        self.model, self.optimiser, self.scheduler = model, optimiser, scheduler
        self.train, self.valid, self.plan, self.device = train, valid, plan, device
        self.world = world
        self.step = Step(model, optimiser, StepSettings(plan.clip, plan.precision, plan.graph, plan.compile), world)
        parallel.same_everywhere(self.step.trained, world)
        self.history: list[dict] = []
        self.epoch = self.position = self.steps = 0
        self.seconds = 0.0
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)  # loss and correct rows since the last row
        self.rows = 0  # and the rows they are over

    def fit(self, on_row: Callable[[dict], None] | None = None) -> list[dict]:
        """Train to the plan's last epoch from wherever the trainer stands; returns `history`."""
        self.model.train()
        while self.epoch < self.plan.epochs:
            with self._bar() as bar:
                self._epoch(bar, on_row)
            if self.scheduler is not None:
                self.scheduler.step()
            self.epoch, self.position = self.epoch + 1, 0
            self.save()
        return self.history

    def _epoch(self, bar, on_row) -> None:
        plan, total = self.plan, len(self.train)
        batches = self.train.epoch(self.epoch, self.position)
        clock = Clock(self.device)
        while group := list(islice(batches, plan.accumulate)):
            rows = sum(self.train.rows(self.position + i) for i in range(len(group)))
            self.sums += self.step(group, rows)
            self.rows += rows
            self.position += len(group)
            self.steps += 1
            bar.update(len(group))
            last = self.position == total
            evaluate = last or (plan.eval_every and self.steps % plan.eval_every == 0)
            keep = not last and plan.checkpoint_every and self.steps % plan.checkpoint_every == 0
            if evaluate or keep:
                self.seconds += clock.lap()
                if evaluate:
                    self._record(self.epoch + self.position / total, bar, on_row)
                if keep:
                    self.save()
                clock.lap()

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """(mean cross-entropy, accuracy between 0 and 1) over `batches`, the model in evaluation mode.

        Raises WorkError when the cross-entropy is not finite.
        """
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for *inputs, labels in batches.shared():
            with autocast(self.device, self.plan.precision):
                logits = self.model(*inputs)
            sums += tally(F.cross_entropy(logits.float(), labels), logits, labels)
        self.model.train(training)
        loss, correct = parallel.add(sums, self.world).tolist()
        self._check(loss)
        return loss / batches.size, correct / batches.size

    def _record(self, epoch: float, bar, on_row) -> None:
        (loss, correct), rows = self.sums.tolist(), self.rows
        self._check(loss)
        self.sums.zero_()
        self.rows = 0
        rate = float(f"{self.optimiser.param_groups[0]['lr']:.12g}")  # 0.01, say, and not 0.010000000000000002
        row = {"epoch": round(epoch, 6), "step": self.steps,
               "train_loss": loss / rows, "train_accuracy": correct / rows, "valid_loss": None, "valid_accuracy": None,
               "learning_rate": rate, "seconds": round(self.seconds, 4)}
        if self.valid is not None:
            row["valid_loss"], row["valid_accuracy"] = self.evaluate(self.valid)
        self.history.append(row)
        values = {"loss": row["train_loss"], "accuracy": row["valid_accuracy"] or row["train_accuracy"]}
        bar.set_postfix({key: f"{value:.4f}" for key, value in values.items()})
        if on_row is not None:
            on_row(row)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            epoch = min(self.epoch + 1, self.plan.epochs)
            raise WorkError(f"training diverged in epoch {epoch}: the loss is {loss}; a smaller --lr may help")

    def save(self) -> None:
        """Write the checkpoint, if the plan keeps one: all processes call, the first one writes.

        Raises WorkError when a trained parameter is not finite, which the loss need not show.
        """
        if not torch.stack([p.isfinite().all() for p in self.step.trained]).all():
            self._check(math.nan)
        if self.plan.checkpoint is None:
            return
        tensors, state = pack(self.model, self.optimiser, self.scheduler, self.device)
        for name in _generators(tensors):
            tensors[name] = parallel.gather(tensors[name], self.world, self.device)
        state |= {key: getattr(self, key) for key in self._COUNTS}
        state |= {"scaler": self.step.scaler.state_dict(), "run": self.plan.run}
        if self.world.first:
            write_checkpoint(self.plan.checkpoint, tensors | {"sums": self.sums}, state)

    def resume(self) -> bool:
        """Go back to the plan's checkpoint; False when there is none. UserError when it is damaged or another's."""
        path = self.plan.checkpoint
        if path is None or not path.exists():
            return False
        tensors, state = read_checkpoint(path)
        if state.get("run") != self.plan.run:
            raise UserError(f"{path}: a checkpoint of a run with other settings; delete it to start again")
        for name in _generators(tensors):
            count = len(tensors[name]) if tensors[name].dim() else 0
            if count != self.world.size:
                raise UserError(f"{path}: a checkpoint of {count} processes, these are {self.world.size}")
            tensors[name] = tensors[name][self.world.rank]
        if (wrong := self._wrong(tensors, state)) is not None:
            raise UserError(f"{path}: damaged, its {wrong} is {shown(state.get(wrong))}; delete it to start again")
        unpack(path, self.model, self.optimiser, self.scheduler, self.device, tensors, state)
        for key in self._COUNTS:
            setattr(self, key, state[key])
        self.sums.copy_(tensors["sums"])
        if state["scaler"]:
            self.step.scaler.load_state_dict(state["scaler"])
        return True

    def _wrong(self, tensors: dict[str, Tensor], state: dict) -> str | None:
        """The entry of a checkpoint that no training by this plan comes to, or None."""
        epoch, position, steps, seconds, rows, history = (state.get(key) for key in self._COUNTS)
        batches = len(self.train)

        def up_to(most: int, value: object) -> bool:
            return type(value) is int and 0 <= value <= most

        def is_row(row: object) -> bool:
            return (isinstance(row, dict) and row.keys() == {*self._ROW}
                    and all(value is None or alike(0, value) for value in row.values()))

        if not up_to(self.plan.epochs, epoch):
            return "epoch"
        if not up_to(batches - 1 if epoch < self.plan.epochs else 0, position):
            return "position"
        if steps != epoch * -(-batches // self.plan.accumulate) + -(-position // self.plan.accumulate):
            return "steps"
        if not alike(0, seconds) or seconds < 0:
            return "seconds"
        if not up_to(self.train.size, rows):
            return "rows"
        if not isinstance(history, list) or len(history) < epoch or not all(map(is_row, history)):
            return "history"
        if not alike(self.step.scaler.state_dict(), state.get("scaler")):
            return "scaler"
        sums = tensors.get("sums")
        return None if sums is not None and sums.dtype == self.sums.dtype and sums.shape == self.sums.shape else "sums"

    def _bar(self):
        from tqdm import tqdm

        return tqdm(total=len(self.train), initial=self.position, desc=f"epoch {self.epoch + 1}/{self.plan.epochs}",
                    unit="batch", disable=None if self.plan.progress and self.world.first else True, mininterval=0.2)


def _generators(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the generators' states among a checkpoint's tensors: each process has its own."""
    return [name for name in tensors if name.startswith("generator.")]
