"""What must hold exactly: merging and back, saving and loading, and the start of training.

python -m tests.campaigns.properties --count 2000 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import pickle
import random
import sys
import tempfile
import time

import torch
from torch import Tensor, nn

import fastlora

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def drawn(rng: random.Random) -> tuple[nn.Module, nn.Module, Tensor]:
    """(a base model, a copy of it with LoRA layers, x) with random sizes, dtypes and settings."""
    torch.manual_seed(rng.randrange(2**31))
    a, b, c = (rng.choice((1, 2, 3, 8, 17, 40)) for _ in range(3))
    base = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c, bias=False)).to(rng.choice(DTYPES))
    model = fastlora.inject(
        copy.deepcopy(base), r=rng.choice((1, 2, 4, 8, 33)), lora_alpha=rng.choice((1, 16, 0.1, -3.0, 7)),
        lora_dropout=rng.choice((0.0, 0.1)), use_rslora=rng.random() < 0.3,
        adapter_dtype=rng.choice((None, torch.float32)),
    )  # fmt: skip
    return base, model, torch.randn(rng.choice((1, 5)), a).to(base[0].weight.dtype)


def starts_at_the_base(base, model, x) -> bool:
    """With lora_B zero the output is the base model's, to the bit."""
    model.train()
    return torch.equal(model(x), base(x))


def merges_and_back(base, model, x) -> bool:
    """unmerge gives each weight's bits back, after any number of merges."""
    before = [(layer.weight, layer.weight.detach().clone()) for layer in trained(model)]
    for _ in range(3):
        _merged_for_a_while(model)
    return all(
        not layer.merged and layer.weight is weight and same_bits(weight, bits)
        for layer, (weight, bits) in zip(layers(model), before, strict=True)
    )


def saves_and_loads(base, model, x) -> bool:
    """What comes back from the disk, into the base model, computes the same bits."""
    trained(model)
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save_adapter(model, folder)
        again = fastlora.load_adapter(copy.deepcopy(base), folder)
    ours, theirs = model.eval().state_dict(), again.eval().state_dict()
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours) and torch.equal(
        model(x).nan_to_num(), again(x).nan_to_num()
    )  # fmt: skip


def reading_changes_nothing(base, model, x) -> bool:
    """Saving, copying, printing and merging for a while leave parameters, names and output as they were."""
    trained(model)
    model.eval()

    def seen():
        return [(n, id(p)) for n, p in model.named_parameters()], list(model.state_dict()), model(x).nan_to_num()

    *names, y = seen()
    for act in READINGS:
        act(model)
        *now, now_y = seen()
        if now != names or not torch.equal(now_y, y):
            return False
    return True


def _merged_for_a_while(model: nn.Module) -> None:
    for layer in layers(model):
        layer.merge()
        assert layer.merged
    model.state_dict()
    copy.deepcopy(model)
    for layer in layers(model):
        layer.unmerge()


READINGS = (
    nn.Module.state_dict, lambda model: model.state_dict(keep_vars=True), copy.deepcopy, repr, pickle.dumps,
    _merged_for_a_while, lambda model: model.load_state_dict(model.state_dict()), lambda model: model.train().eval(),
)  # fmt: skip
PROPERTIES = (starts_at_the_base, merges_and_back, saves_and_loads, reading_changes_nothing)


def layers(model: nn.Module) -> list[fastlora.FusedLoRALinear]:
    return [m for m in model.modules() if isinstance(m, fastlora.FusedLoRALinear)]


@torch.no_grad()
def trained(model: nn.Module) -> list[fastlora.FusedLoRALinear]:
    """The model's layers, each with an update that is not zero."""
    for layer in layers(model):
        layer.lora_A.normal_(std=0.3)
        layer.lora_B.normal_(std=0.3)
    return layers(model)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = [t.detach().contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype is b.dtype and torch.equal(*bits)


def campaign(count: int, seed: int) -> list[str]:
    """The cases, of `count`, in which a property does not hold."""
    rng, wrong = random.Random(seed), []
    for number in range(count):
        base, model, x = drawn(rng)
        for holds in PROPERTIES:
            if not holds(base, model, x):
                wrong.append(f"case {number}: {holds.__name__} with {x.dtype}, {model}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.properties", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, wrong = time.monotonic(), campaign(args.count, args.seed)
    print("\n".join(wrong[:20]))
    said = f"{args.count} models, {len(PROPERTIES)} properties each, {len(wrong)} wrong"
    print(f"seed {args.seed}: {said}, {time.monotonic() - began:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
