"""The one training loop of the programs here: `Trainer.fit`. Epochs of steps, evaluation, checkpoints.

Nothing in the loop knows what a model or an adapter is: `Step` does. What `Trainer.save` writes is all that a run goes
on from. Several adapters over one base may train at once (`--sweep`): a plain run is a sweep of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastlora.errors import WorkError
from fastlora.finetune import parallel
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import Batches
from fastlora.finetune.step import Settings, Step


@dataclass
class Member:
    """One of the adapters that train at once; a plain run has one, without a name."""

    name: str | None = None  # its adapter's in the model
    own: dict = field(default_factory=lambda: {"seed": 0})  # lr, rank, alpha; seed of its start and order of batches
    history: list[dict] = field(default_factory=list)  # a row per evaluation
    stopped: str | None = None  # why it trains no more
    sums: Tensor | int = 0  # float64 (2,), the summed loss and the correct rows since the last evaluation

    @property
    def label(self) -> str:
        """Its settings as --sweep names them."""
        return " ".join(f"{key}={value:g}" for key, value in self.own.items())


@dataclass
class Trainer:
    """Trains the parameters of `optimiser` by cross-entropy on `model(*inputs)`, logits (batch, classes)."""

    model: nn.Module
    optimiser: torch.optim.Optimizer  # with one group of parameters for each member, of its name
    train: Batches
    valid: Batches
    settings: Settings
    members: Sequence[Member] = field(default_factory=lambda: [Member()])
    progress: bool = True  # show a progress bar, and a line for each evaluation
    epoch: int = 0  # epochs done
    position: int = 0  # batches done in this epoch
    steps: int = 0  # optimiser steps done in all
    seconds: float = 0.0  # of training, evaluation left out

    def __post_init__(self):
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.at_once = len(self.members)  # members whose rows share a batch
        self.step = Step(self.model, self.optimiser, self.settings)
        self.device, self.progress = self.step.device, self.progress and parallel.first()

    def fit(self) -> None:
        """Train to the last epoch from wherever the trainer stands."""
        settings = self.settings
        self.model.train()
        self._seed()
        while self.epoch < settings.epochs:
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
                rate *= settings.decay**self.epoch
                if isinstance(group["lr"], Tensor):  # the very tensor that a captured step reads
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            with tqdm(total=len(self.train), initial=self.position, desc=f"epoch {self.epoch + 1}/{settings.epochs}",
                      unit="batch", disable=None if self.progress else True, mininterval=0.2) as bar:  # fmt: skip
                rows, began = 0, self._now()
                while self.position < len(self.train):
                    numbers = range(self.position, min(self.position + settings.accumulate, len(self.train)))
                    self._step(numbers)
                    rows += sum(map(self.train.rows, numbers))
                    self.position += len(numbers)
                    self.steps += 1
                    bar.update(len(numbers))
                    last = self.position == len(self.train)
                    if last or (settings.eval_every and self.steps % settings.eval_every == 0):
                        self.seconds += self._now() - began
                        self._record(rows)
                        if not last:
                            self.save()
                        rows, began = 0, self._now()
            self.epoch, self.position = self.epoch + 1, 0
            self.save()

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> list[tuple[Member, float, float]]:
        """(member, mean cross-entropy, accuracy between 0 and 1) over `batches`, in evaluation mode.

        Members whose cross-entropy is not finite are stopped and left out; WorkError when it is the last one's.
        """
        members, training = self.alive(), self.model.training
        sums = torch.zeros(len(members), 2, device=self.device, dtype=torch.float64)
        self.model.eval()
        for part, own in zip(self._parts(self.at_once), sums.split(self.at_once), strict=True):
            for *inputs, labels in batches.in_order(len(part)):
                with self.step.routed(len(labels)):
                    own += self.step.losses(inputs, labels)[1]
        self.model.train(training)
        sums = parallel.add(sums).tolist()
        for member, (loss, _) in zip(members, sums, strict=True):
            if not math.isfinite(loss):
                self._stop(member, f"the loss is {loss}")
        rows = zip(members, sums, strict=True)
        return [(m, loss / batches.size, correct / batches.size) for m, (loss, correct) in rows if not m.stopped]

    def alive(self) -> list[Member]:
        """The members that still train."""
        return [member for member in self.members if not member.stopped]

    def save(self) -> None:
        """Write the checkpoint, if one is kept; WorkError when a trained parameter is not finite."""
        for (member,) in self._parts(1):
            if not torch.stack([p.isfinite().all() for p in self.step.groups()[0]["params"]]).all():
                self._stop(member, "a parameter is not finite")
        if self.settings.checkpoint is not None and parallel.first():
            trained = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
            kept = {f"optimiser.{i}.{key}": value for i, held in self.optimiser.state_dict()["state"].items()
                    for key, value in held.items() if isinstance(value, Tensor)}  # fmt: skip
            write_checkpoint(self.settings.checkpoint, trained | kept, epoch=self.epoch, steps=self.steps,
                             position=self.position, seconds=self.seconds, scaler=self.step.scaler.state_dict(),
                             members=[[member.history, member.stopped] for member in self.members])  # fmt: skip
        self._seed()

    def resume(self) -> bool:
        """Go back to the checkpoint; False when there is none. UserError when it is damaged or of another model."""
        path = self.settings.checkpoint
        if path is None or not path.exists():
            return False
        tensors, state = read_checkpoint(path)
        kept: dict[int, dict] = {}
        for name in [name for name in tensors if name.startswith("optimiser.")]:
            _, index, key = name.split(".")
            kept.setdefault(int(index), {})[key] = tensors.pop(name)
        fill(self.model, path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
             {name for name, p in self.model.named_parameters() if p.requires_grad})  # fmt: skip
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": kept})
        self.step.scaler.load_state_dict(state["scaler"])
        for member, (history, stopped) in zip(self.members, state["members"], strict=True):
            member.history, member.stopped = history, stopped
        self.epoch, self.position, self.steps = state["epoch"], state["position"], state["steps"]
        self.seconds = state["seconds"]
        return True

    def _parts(self, size: int) -> Iterator[list[Member]]:
        """The members that still train, at most `size` at a time; the step is told whose rows it gets."""
        members = self.alive()
        for i in range(0, len(members), size):
            self.step.names = tuple(member.name for member in members[i : i + size])
            yield members[i : i + size]

    def _step(self, numbers: range) -> None:
        """A step on the batches `numbers`. A sweep's members that diverge in it are stopped, and the others' redone.

        On a GPU one member's NaN reaches the others' gradients through products with zero: one at a time tells whose.
        """

        def group(part: list[Member]) -> list[tuple[Tensor, ...]]:
            return [self.train.at(self.epoch, i, [member.own["seed"] for member in part]) for i in numbers]

        members, at_once, sums = self.alive(), self.at_once, None
        if len(list(self._parts(at_once))) == 1:
            sums, at_once = self.step(group(members)), 1
        while sums is None:
            found = torch.cat([self.step.gradients(group(part)) for part in self._parts(at_once)])
            lost = found.isnan().any(1).tolist()
            for member, bad in zip(members, lost, strict=True):
                if bad and at_once == 1:
                    self._stop(member, "its loss or gradient is not finite")
            if any(lost):
                members, at_once = self.alive(), 1
            else:
                self.step.names = tuple(member.name for member in members)
                self.step.update()
                sums = found
        for member, own in zip(members, sums, strict=True):
            member.sums = member.sums + own

    def _record(self, rows: int) -> None:
        for member in self.alive():
            if not math.isfinite(loss := float(member.sums[0])):
                self._stop(member, f"the loss is {loss}")
        rates = {group.get("name"): group["lr"] for group in self.optimiser.param_groups}
        for member, valid_loss, valid_accuracy in self.evaluate(self.valid):
            loss, correct = member.sums.tolist()
            member.sums = 0
            member.history.append({
                "epoch": round(self.epoch + self.position / len(self.train), 6),
                "step": self.steps,
                "train_loss": loss / rows,
                "train_accuracy": correct / rows,
                "valid_loss": valid_loss,
                "valid_accuracy": valid_accuracy,
                "learning_rate": float(f"{rates[member.name]:.12g}"),  # 0.01, not 0.010000000000000002
                "seconds": round(self.seconds, 4),
            })  # fmt: skip
        if self.progress:
            member = best(self.alive())
            row = member.history[-1]
            tqdm.write(f"epoch {row['epoch']:.4g}, step {row['step']}: loss {row['train_loss']:.4f}, accuracy "
                 f"{row['train_accuracy']:.2%}; validation loss {row['valid_loss']:.4f}, accuracy "
                 f"{row['valid_accuracy']:.2%}" + (f" ({member.label})" if member.name else ""))  # fmt: skip

    def _stop(self, member: Member, why: str) -> None:
        (trained,) = (group["params"] for group in self.optimiser.param_groups if group.get("name") == member.name)
        for p in trained:  # so that no NaN of its own reaches others, or a checkpoint
            p.grad = None
            p.detach().zero_()
        member.stopped = f"diverged in epoch {min(self.epoch + 1, self.settings.epochs)}: {why}; a smaller lr may help"
        if not self.alive():
            raise WorkError(f"training {member.stopped}")
        if self.progress:
            tqdm.write(f"{member.label} {member.stopped}")

    def _seed(self) -> None:
        """A seed of its own for what follows, so that no checkpoint holds a generator's state."""
        seed = self.members[0].own["seed"] * 1_000_003 + self.steps
        torch.manual_seed((seed * parallel.size() + parallel.rank()) % 2**63)

    def _now(self) -> float:
        if self.device.type == "cuda":  # which works on after it was asked to
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def best(members: Sequence[Member]) -> Member:
    """The member whose last validation accuracy is the highest; of those, whose loss is the lowest."""
    return max(members, key=lambda m: (m.history[-1]["valid_accuracy"], -m.history[-1]["valid_loss"]))
