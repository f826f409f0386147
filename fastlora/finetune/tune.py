"""A run of this package's trainer: adapters put into a base, trained, tested and left in the run's folder.

A plain run has one. `--sweep "lr=0.3,1 rank=2,8"` trains every combination of the values at once, over one frozen base:
each has its adapter, head, group of the optimiser, order of batches and history.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlora
from fastlora.errors import UserError
from fastlora.finetune import parallel
from fastlora.finetune import run as runs
from fastlora.finetune.data import Data
from fastlora.finetune.step import Settings
from fastlora.finetune.trainer import Member, Trainer, best
from fastlora.linear import EagerLoRALinear, FusedLoRALinear

CPU_ROWS = 1024  # of a pass through the model: more fall out of the caches
LAYERS = {"fused": FusedLoRALinear, "eager": EagerLoRALinear}


def members_of(args: argparse.Namespace) -> list[Member]:
    """The members of a run: the sweep's, or the only one, which has no name."""
    own = {"lr": args.lr, "rank": args.rank, "alpha": args.alpha, "seed": args.seed}
    if not args.sweep:
        return [Member(None, own)]
    torchrun = torch.distributed.is_torchelastic_launched()
    if args.impl != "fused" or args.precision == "float16" or args.compile or torchrun:
        raise UserError("--sweep goes with --impl fused and fp32 or bf16, without --compile and torchrun")
    product = [dict(zip(args.sweep, values, strict=True)) for values in itertools.product(*args.sweep.values())]
    return [Member(f"run{i}", own | chosen) for i, chosen in enumerate(product)]


def adapt(model: nn.Module, members: list[Member], impl: str, targets: list[str] | str, heads=()) -> None:
    """Give `model` the members' LoRA layers, and each `heads` of its own, drawn by its seed; freeze the rest."""
    adapters = {m.name: {"r": m.own["rank"], "lora_alpha": m.own["alpha"]} for m in members}
    how = adapters.get(None, {"adapters": adapters})
    fastlora.inject(model, **how, target_modules=targets, modules_to_save=heads, layer_class=LAYERS[impl])
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for i, member in enumerate(members):
        torch.manual_seed(member.own["seed"] + 1)
        for name in heads:
            part_of(model.get_submodule(name), member).reset_parameters()
        for layer in layers[i :: len(members)]:
            layer.reset_lora_parameters()


def part_of(module: nn.Module, member: Member) -> nn.Module:
    """A member's own part of a module that `adapt` made the members' own."""
    return module if member.name is None else getattr(module, "adapters", getattr(module, "copies", None))[member.name]


def groups_of(model: nn.Module, members: Iterable[Member]) -> list[dict]:
    """A group of the optimiser for each member."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [{"params": [p for name, p in trained.items() if m.name is None or f".{m.name}." in name],
             "lr": m.own["lr"], "name": m.name} for m in members]  # fmt: skip


def announce(trainer: Trainer) -> None:
    """Say what memory a sweep needs and how large one would fit; UserError where this one does not.

    Measured: what one member keeps for backward of its first batch, beside its gradients and the optimiser's numbers.
    """
    member, kept = max(trainer.members, key=lambda member: member.own["rank"]), {}
    count, free = len(trainer.members), free_memory(trainer.device)

    def pack(tensor: Tensor) -> None:  # kept itself, an output keeps its own graph alive: no step could be captured
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    trainer.step.names = (member.name,)
    base = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    *inputs, labels = trainer.train.at(0, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing), trainer.step.routed(len(labels)):
        trainer.step.losses(inputs, labels)
    copies = 4 if isinstance(trainer.optimiser, torch.optim.AdamW) else 2  # parameters, gradients, the optimiser's two
    each = copies * sum(p.nbytes for group in groups_of(trainer.model, [member]) for p in group["params"])
    batch, at_once = sum(size for place, size in kept.items() if place not in base), trainer.at_once
    need = count * each + at_once * batch
    fit = int((0.9 * free - at_once * batch) / each) if at_once < count else int(0.9 * free / (each + batch))
    fit = max(0, fit)
    print(f"{count} runs at once need about {need / 2**20:,.1f} MiB; {free / 2**20:,.0f} MiB are free, enough for "
          f"{fit:,} runs", flush=True)  # fmt: skip
    if count > fit:
        raise UserError(f"--sweep: {count} runs need more memory than there is; at most {fit} fit")


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of the machine's, that a process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux: all of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fine_tune(
    args: argparse.Namespace, settings: dict, model: nn.Module, optimiser: torch.optim.Optimizer, members: list[Member],
    data: Data, layer: nn.Module, title: str,
) -> None:  # fmt: skip
    """Train, test, and leave everything in `args.output`; a sweep's adapters each, and its best as a plain run's.

    It goes on from the checkpoint of a run that began. `settings` are the run's, for its report; `layer`, one of the
    LoRA layers, tells the path. The eager layer is left to plain steps.
    """
    folder, several = args.output, bool(args.sweep)
    said = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    said |= {"graph": args.impl == "fused" and not args.no_graph, "checkpoint": folder / runs.CHECKPOINT}
    trainer = Trainer(model, optimiser, data.train, data.valid, Settings(**said), members)
    if trainer.resume() and parallel.first():
        print(f"resumed after step {trainer.steps}")
    if trainer.device.type == "cpu":
        rows = data.train.rows(0) * math.prod(data.shape)
        trainer.at_once = max(1, min(len(trainer.members), CPU_ROWS // rows))
    if several:
        announce(trainer)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    trainer.fit()
    tested = {member.name: accuracy for member, _, accuracy in trainer.evaluate(data.test)}
    if not parallel.first():
        return
    member, report = best(trainer.alive()), {}
    if several:
        for one in trainer.alive():
            fastlora.save_adapter(model, folder / "adapters" / one.label.replace(" ", ","), adapter=one.name)
        report = {"best": member.label, "runs": [
            {"name": one.label, **one.own, "valid_accuracy": one.history[-1]["valid_accuracy"] if one.history else None,
             "test_accuracy": tested.get(one.name), "stopped": one.stopped} for one in trainer.members]}  # fmt: skip
        for run in report["runs"]:
            how = run["stopped"] or f"validation {run['valid_accuracy']:.2%}, test {run['test_accuracy']:.2%}"
            print(f"{run['name']}: {how}{' (best on validation: kept)' * (run['name'] == member.label)}")
        title = f"{title}, best of {len(trainer.members)}"
    fastlora.save_adapter(model, folder, adapter=member.name)
    rows = data.train.rows(0) * len(trainer.step.names)
    with trainer.step.routed(rows):
        x = torch.zeros(rows, *data.shape, part_of(layer, member).in_features, device=trainer.device)
        path = "eager" if args.impl == "eager" else fastlora.explain(layer, x.to(part_of(layer, member).weight)).path
    history = [({"run": one.label} if several else {}) | row for one in trainer.members for row in one.history]
    runs.leave(folder, history, f"{title}: {tested[member.name]:.1%} on test", trainer.device, {
        **settings, **member.own, **report, **data.facts, **runs.counts(model, member.name), "path": path,
        "dataset": args.data if args.data in ("sample", "auto") else str(data.folder),
        "batches": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "train_seconds": round(trainer.seconds, 3), "plain_steps_because": trainer.step.plain,
        "tokens_per_second": round(
            data.tokens * len(trainer.members) * trainer.settings.epochs / max(trainer.seconds, 1e-9)),
        "train_accuracy": member.history[-1]["train_accuracy"],
        "valid_accuracy": member.history[-1]["valid_accuracy"], "test_accuracy": tested[member.name]})  # fmt: skip
