"""One of two gloo processes: each way to train a patched model in parallel, against one process on the whole batch.

    torchrun --standalone --nproc-per-node 2 tests/peft/distributed_worker.py RESULTS.json

Everything is float64, so that a wrong gradient cannot hide in rounding.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import build, layer_of
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastlora.peft

warnings.simplefilter("ignore")
LAYERS = ("first", "conv", "last")


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2_whole(model):
    fully_shard(model)
    return model


def fsdp2_each_layer(model):
    """Every LoRA layer is a unit: `fully_shard` puts its own class on top of ours."""
    for name in LAYERS:
        fully_shard(layer_of(model, name))
    fully_shard(model)
    return model


def fsdp2_inside_layers(model):
    """lora_A, lora_B and the base are units: outside their own forward they are sharded, so nothing can be fused."""
    for name in LAYERS:
        layer = layer_of(model, name)
        for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            fully_shard(part)
    fully_shard(model)
    return model


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_inside_layers(model):
    for name in LAYERS:
        layer = layer_of(model, name)
        for parts in (layer.lora_A, layer.lora_B):
            parts["default"] = fsdp1(parts["default"])
    return fsdp1(model)


WAYS = (ddp, fsdp2_whole, fsdp2_each_layer, fsdp2_inside_layers, fsdp1, fsdp1_inside_layers)


def train(model: nn.Module, x, target, steps=3) -> list[float]:
    """Losses of a few steps, of the process's own rows."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, target = torch.randn(8, 24, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    alone = build(torch.float64)
    start = copy.deepcopy(alone)
    want = train(alone, x, target)
    with torch.no_grad():
        final = alone(x[mine])
    results = {}
    for way in WAYS:
        inner = fastlora.peft.patch(copy.deepcopy(start))
        try:
            model = way(inner)
            losses = torch.tensor(train(model, x[mine], target[mine]), dtype=torch.float64)
            dist.all_reduce(losses)
            with torch.no_grad():
                difference = (whole(model(x[mine])) - final).abs().max()
            dist.all_reduce(difference, dist.ReduceOp.MAX)
            report = fastlora.peft.report(inner)
            results[way.__name__] = {
                "losses": (losses / 2).tolist(),
                "want": want,
                "difference": difference.item(),
                "fused_calls": report.fused_calls,
                "fallback_calls": report.fallback_calls,
                "entries": {name.rsplit(".", 1)[-1]: str.__str__(entry) for name, entry in report.items()},
                "reasons": sorted({reason for entry in report.values() for reason in entry.reasons}),
            }
        except Exception as error:  # reported by the test, which then fails
            results[way.__name__] = {"error": f"{type(error).__name__}: {error}"}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
