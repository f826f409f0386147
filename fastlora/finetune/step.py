"""One optimiser step: forward, loss, backward, update; run plainly, or captured once as a CUDA graph and replayed.

A step of a small model on a GPU is bound by launches: hundreds of kernels of a few microseconds, each launched from
Python. A CUDA graph launches them all at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora.errors import warn_once
from fastlora.finetune import parallel
from fastlora.finetune.data import Batch

WARM_UP = 3  # plain steps of a shape before its capture: libraries set themselves up, kernels are compiled
MAX_GRAPHS = 32  # shapes captured; each keeps the memory of its activations


@dataclass(frozen=True)
class Settings:
    """How each step is taken, and how long the trainer goes on."""

    clip: float | None = None  # largest norm of the gradient; None does not clip
    precision: str = "float32"  # or "bfloat16" or "float16", for autocast
    graph: bool = False  # capture the step as a CUDA graph where that can be done
    compile: bool = False  # pass the model's forward through torch.compile, in one graph
    epochs: int = 1  # passes over the training batches
    decay: float = 1.0  # the rates are multiplied by it after each epoch
    eval_every: int | None = None  # steps between evaluations and checkpoints, besides those at each epoch's end
    accumulate: int = 1  # batches whose gradients are summed into one optimiser step
    checkpoint: Path | None = None  # its path; None keeps none


class Step:
    """`step(group)` takes one optimiser step on a group of batches; float64 (n, 2): summed loss, correct rows.

    Trained is the mean cross-entropy of `model(*inputs)`, logits (batch, classes), over the group's rows. n adapters
    over one frozen base may train at once: a batch then holds as many rows of each, one after the other. Where a loss
    or gradient of one of them is not finite, its sums are NaN, nothing is updated, and the step returns None:
    `gradients`, of some at a time, and `update` then tell whose it is and do without it.
    """

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, settings: Settings):
        self.model, self.optimiser, self.settings = model, optimiser, settings
        self.names: tuple[str | None, ...] = (None,)  # whose rows a batch has, in the groups' order; None: the only one
        self.device = optimiser.param_groups[0]["params"][0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self._forward = torch.compile(model, fullgraph=True) if settings.compile else model
        if parallel.size() > 1:
            self._forward = DistributedDataParallel(self._forward)
        self.plain = why_plain(self.device, settings)  # or None when steps are captured as CUDA graphs
        if self.plain is None:
            self._stream = torch.cuda.Stream(self.device)
            self._seen: Counter = Counter()
            self._graphs: dict[tuple, _Captured] = {}
            for group in optimiser.param_groups:
                group["capturable"] = True
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)

    def __call__(self, group: Sequence[Batch]) -> Tensor | None:
        if self.plain is not None:
            return self._run(group)
        key = (self.names, *(tuple(value.shape) for batch in group for value in batch))
        if key in self._graphs:
            return self._graphs[key].replay(group)
        self._seen[key] += 1
        if self._seen[key] > WARM_UP and len(self._graphs) < MAX_GRAPHS:
            current = torch.cuda.current_stream(self.device)
            try:
                self._graphs[key] = _Captured(self, group)
                return self._graphs[key].replay(group)
            except RuntimeError as error:
                self.plain = f"capture failed: {str(error).splitlines()[0]}"
                _leave_capture(current)
                warn_once(("capture", self.plain), f"training steps run without a CUDA graph: {self.plain}")
                return self._run(group)
        # Warm-up and capture share one side stream, so that what libraries keep per stream is there at capture.
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            sums = self._run(group)
        current.wait_stream(self._stream)
        return sums

    def gradients(self, group: Sequence[Batch]) -> Tensor:
        """Leave the gradients of the adapters in `names` in their parameters; the sums."""
        for p in (p for trained in self.groups() for p in trained["params"]):
            p.grad = None
        rows, sums = sum(len(batch[-1]) for batch in group), 0
        for i, (*inputs, labels) in enumerate(group, 1):
            apart = parallel.size() > 1 and i < len(group)  # gradients are exchanged with the last batch's
            with self._forward.no_sync() if apart else nullcontext(), self.routed(len(labels)):
                losses, part = self.losses(inputs, labels)
                loss = losses.sum() * (len(labels) / rows)
                self.scaler.scale(loss).backward()
            sums = sums + part
        self.scaler.unscale_(self.optimiser)
        if self.names[0] is not None:
            fine = self._norms(torch.inf).isfinite().all(1) & sums[:, 0].isfinite()
            sums = sums.masked_fill(~fine[:, None], torch.nan)
        return sums

    def _grads(self) -> list[list[Tensor]]:
        """The gradients of each of `names`."""
        return [[p.grad for p in trained["params"] if p.grad is not None] for trained in self.groups()]

    def _norms(self, order: float) -> Tensor:
        """Of each of `names`, of each of its gradients: (n, gradients)."""
        norms = torch._foreach_norm(list(itertools.chain.from_iterable(self._grads())), order)
        return torch.stack(norms).view(len(self.names), -1)

    def _run(self, group: Sequence[Batch]) -> Tensor | None:
        sums = self.gradients(group)
        if self.names[0] is not None and sums.isnan().any():
            return None
        self.update()
        return parallel.add(sums)

    def update(self) -> None:
        """Move the parameters of `names` by their gradients."""
        if self.settings.clip is not None:  # as nn.utils.clip_grad_norm_ does, each by its own norm
            factors = self.settings.clip / (torch.linalg.vector_norm(self._norms(2.0), dim=1) + 1e-6)
            for own, factor in zip(self._grads(), factors.clamp(max=1.0), strict=True):
                torch._foreach_mul_(own, factor)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def groups(self) -> list[dict]:
        """The optimiser's groups of the adapters in `names`."""
        return [group for group in self.optimiser.param_groups if group.get("name") in self.names]

    def routed(self, rows: int):
        """A context in which the model's `rows` samples belong to `names`, as many to each."""
        if self.names[0] is None:
            return nullcontext()
        return fastlora.route(self.model, [name for name in self.names for _ in range(rows // len(self.names))])

    def losses(self, inputs: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each member's mean cross-entropy, (n,), and float64 (n, 2): its sum and the correct rows. No host waits."""
        n = len(self.names)
        forward = self._forward if torch.is_grad_enabled() else self.model
        dtype = getattr(torch, self.settings.precision)
        # no casts are kept from one step to another, as graphs demand
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            logits = forward(*inputs)
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none").view(n, -1).mean(1)
        correct = (logits.argmax(-1) == labels).view(n, -1).sum(1)
        return losses, torch.stack([losses.detach() * (len(labels) // n), correct], 1).double()


class _Captured:
    """A step of one shape as a CUDA graph, with the buffers that it reads its batches from; of several adapters as two,
    for the host looks at their sums before the update."""

    def __init__(self, step: Step, group: Sequence[Batch]):
        self.inputs = [tuple(value.clone() for value in batch) for batch in group]
        self.graph, self.update = torch.cuda.CUDAGraph(), None
        step.optimiser.zero_grad(set_to_none=True)  # the gradients then live in the graph's own memory
        with torch.cuda.graph(self.graph, stream=step._stream):
            self.sums = step.gradients(self.inputs)
            if step.names[0] is None:
                step.update()
        if step.names[0] is not None:
            self.update = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.update, pool=self.graph.pool(), stream=step._stream):
                step.update()

    def replay(self, group: Sequence[Batch]) -> Tensor | None:
        for mine, theirs in zip(self.inputs, group, strict=True):
            for buffer, value in zip(mine, theirs, strict=True):
                buffer.copy_(value, non_blocking=True)
        self.graph.replay()  # dropout's seeds are drawn inside, by the device's generator: new masks at each replay
        if self.update is not None:
            if self.sums.isnan().any():
                return None
            self.update.replay()
        return self.sums.clone()


def _leave_capture(stream: torch.cuda.Stream) -> None:
    """After a capture that failed torch stays on its stream, and the generator draws no more outside a capture."""
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    anew = torch.Generator(stream.device).manual_seed(generator.initial_seed() + 1)
    generator.graphsafe_set_state(anew.graphsafe_get_state())


def why_plain(device: torch.device, settings: Settings) -> str | None:
    """Why a step cannot be captured as a CUDA graph, or None when it can."""
    if not settings.graph:
        return "plain steps were asked for"
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this one is {device.type}"
    if settings.precision == "float16":
        return "float16's loss scaling decides on the host whether to skip a step"
    return "the processes exchange gradients within the step" if parallel.size() > 1 else None
