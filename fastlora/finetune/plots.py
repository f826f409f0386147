"""`curves.png`: loss and accuracy over the epochs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastlora.finetune.files import write_bytes


def plot_history(path: Path, history: Sequence[Mapping], title: str) -> None:
    """Draw the trainer's rows: loss on the left, accuracy on the right, training and validation."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 40 else None
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "valid"):
            values = [row[f"{part}_{quantity}"] for row in history]
            if any(value is not None for value in values):
                axes.plot(epochs, [float("nan") if value is None else value for value in values], marker=marker,
                          markersize=3, label=part)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())
