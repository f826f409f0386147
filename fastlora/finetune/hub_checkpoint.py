"""transformers' Trainer with a checkpoint of ours: one file, whole or not there, checked before use, and no pickle."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, set_seed

from fastlora.errors import UserError
from fastlora.finetune.checkpoint import pack, read_checkpoint, unpack, write_checkpoint

COLUMNS = ("epoch", "step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rate", "seconds")
_STATE = "trainer_state.json"  # where Trainer.train looks for its state


class CheckpointedTrainer(Trainer):
    """The Trainer with one checkpoint file in the place of its folders, whose parts are pickles written one by one.

    The file holds what is trained, the same of the best epoch, the optimiser, the schedule and the history. No
    generator is needed: every epoch begins with a seed of its own, so that a run which goes on draws what it would have
    drawn.

    Args:
        checkpoint: the file's path.
        run: what must be the same in a run that goes on (texts): {what it is: its digest}.

    Attributes:
        best_weights: what is trained, by name, as it was after the best epoch.
        seconds: of training so far.
    """

    def __init__(self, *args, checkpoint: Path, run: dict[str, str], **kwargs):
        super().__init__(*args, **kwargs)
        self.checkpoint, self.run = checkpoint, run
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._found: tuple[dict[str, Tensor], dict] | None = None
        self.add_callback(_EpochSeeds())

    def fit(self, resume: bool) -> None:
        """Train, from the checkpoint on if there is one and `resume`; the best epoch's weights are left in the model.

        Raises UserError when the checkpoint is damaged or another run's.
        """
        with tempfile.TemporaryDirectory() as folder:
            if resume and self.checkpoint.exists():
                self._found = self._read()
                self._state_after(self._found[1]["history"]).save_to_json(str(Path(folder) / _STATE))
            try:
                self.train(resume_from_checkpoint=folder if self._found else None)
            except BaseException:
                self._close_bars()
                raise
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(self.best_weights[name])

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def keep_best(self) -> None:
        """Remember what is trained as it is now."""
        self.best_weights = {name: p.detach().clone() for name, p in self.trained().items()}

    def history(self) -> list[dict]:
        """A row per evaluation, with the columns of every program's `history.csv`."""
        return [entry["row"] for entry in self.state.log_history if "row" in entry]

    def _read(self) -> tuple[dict[str, Tensor], dict]:
        tensors, state = read_checkpoint(self.checkpoint)
        if state.get("run") != self.run:
            before = state["run"] if isinstance(state.get("run"), dict) else {}
            changed = [what for what in self.run if before.get(what) != self.run[what]]
            raise UserError(f"{self.checkpoint}: the {(changed or ['run'])[0]} is not what the run was started with")
        wanted = {name: (p.shape, p.dtype) for name, p in self.trained().items()}
        best = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
        whole = {name: (t.shape, t.dtype) for name, t in best.items() if t.isfinite().all()} == wanted
        if not (whole and _is_history(state.get("history"), self.args.num_train_epochs)):
            raise UserError(f"{self.checkpoint}: not a checkpoint of this program; delete it to start again")
        return tensors, state

    def _state_after(self, rows: list[dict]) -> TrainerState:
        return TrainerState(epoch=rows[-1]["epoch"], global_step=rows[-1]["step"],
                            train_batch_size=self._train_batch_size, log_history=[{"row": row} for row in rows])

    # The Trainer's own hooks for its folders.

    def _save_checkpoint(self, *args, **kwargs) -> None:
        if not self.args.should_save:
            return
        tensors, state = pack(self.model, self.optimizer, self.lr_scheduler, self.args.device)
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        write_checkpoint(self.checkpoint, tensors, {**state, "run": self.run, "history": self.history()})

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        """Nothing yet: all that the file holds is taken at once, when there is an optimiser."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if self._found is None:
            return
        tensors, state = self._found
        unpack(self.checkpoint, self.model, self.optimizer, self.lr_scheduler, self.args.device, tensors, state)
        self.best_weights = {name: tensors[f"best.{name}"].to(p.device) for name, p in self.trained().items()}
        self.seconds = state["history"][-1]["seconds"]

    def _load_rng_state(self, checkpoint) -> None:
        """Nothing: see `_EpochSeeds`."""

    def _close_bars(self) -> None:
        """So that what is said of an error begins a line."""
        for callback in self.callback_handler.callbacks:
            for name in ("prediction_bar", "training_bar"):
                bar = getattr(callback, name, None)
                if bar is not None:
                    bar.close()


class _EpochSeeds(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        set_seed((args.seed + state.global_step) % 2**32)


def _is_history(rows: object, most: float) -> bool:
    """Whether `rows` is the history of some whole epochs, `most` of them or fewer."""
    if not (isinstance(rows, list) and 1 <= len(rows) <= most):
        return False
    numbers = all(isinstance(row, dict) and row.keys() == set(COLUMNS)
                  and all(type(number) in (int, float) and abs(number) < 2**63 for number in row.values())
                  for row in rows)
    return numbers and type(rows[0]["step"]) is int and rows[0]["step"] > 0 and all(
        (row["epoch"], row["step"]) == (count, count * rows[0]["step"]) for count, row in enumerate(rows, 1))
