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


class Net(nn.Module):
    """Two layers, one of them shared by name with nothing."""

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype):
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1], dtype=dtype)
        self.last = nn.Linear(sizes[1], sizes[2], bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def drawn(rng: random.Random) -> tuple[nn.Module, nn.Module, Tensor, dict]:
    """(a base model, a copy of it with LoRA layers, x, the settings) with random sizes and dtypes."""
    torch.manual_seed(rng.randrange(2**31))
    dtype = rng.choice(DTYPES)
    base = Net(tuple(rng.choice((1, 2, 3, 8, 17, 40)) for _ in range(3)), dtype)
    settings = {
        "r": rng.choice((1, 2, 4, 8, 33)), "lora_alpha": rng.choice((1, 16, 0.1, -3.0, 7)),
        "lora_dropout": rng.choice((0.0, 0.1)), "use_rslora": rng.random() < 0.3, "target_modules": "all-linear",
        "adapter_dtype": rng.choice((None, torch.float32)),
    }  # fmt: skip
    model = fastlora.inject(copy.deepcopy(base), **settings)
    return base, model, torch.randn(rng.choice((1, 5)), base.first.in_features).to(dtype), settings


def starts_at_the_base(base, model, x) -> bool:
    """With lora_B zero the output is the base model's: to the bit, for what zeros are added to."""
    model.train()
    return torch.equal(model(x), base(x))


def merges_and_back(base, model, x) -> bool:
    """unmerge gives each weight's bits back, after any number of merges."""
    trained(model)
    layers = [m for m in model.modules() if isinstance(m, fastlora.FusedLoRALinear)]
    before = [(layer.weight, layer.weight.detach().clone()) for layer in layers]
    for _ in range(3):
        for layer in layers:
            layer.merge()
        if any(not layer.merged for layer in layers):
            return False
        for layer in layers:
            layer.unmerge()
    return all(layer.weight is w and same_bits(w, bits) for layer, (w, bits) in zip(layers, before, strict=True))


def saves_and_loads(base, model, x) -> bool:
    """What comes back from the disk, into the base model, computes the same bits."""
    trained(model)
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save_adapter(model, folder)
        again = fastlora.load_adapter(copy.deepcopy(base), folder)
    model.eval(), again.eval()
    ours, theirs = model.state_dict(), again.state_dict()
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours) and torch.equal(
        model(x).nan_to_num(), again(x).nan_to_num()
    )  # fmt: skip


def reading_changes_nothing(base, model, x) -> bool:
    """Saving, copying, printing and merging for a while leave parameters, names and output as they were."""
    trained(model)
    model.eval()

    def seen():
        return [(name, id(p)) for name, p in model.named_parameters()], list(model.state_dict()), model(x)

    names, keys, y = seen()
    for act in random.Random(len(keys) + x.numel()).choices(READINGS, k=5):
        act(model)
        now_names, now_keys, now_y = seen()
        if now_names != names or now_keys != keys or not torch.equal(now_y.nan_to_num(), y.nan_to_num()):
            return False
    return True


def _merged_for_a_while(model: nn.Module) -> None:
    layers = [m for m in model.modules() if isinstance(m, fastlora.FusedLoRALinear)]
    for layer in layers:
        layer.merge()
    model.state_dict()
    copy.deepcopy(model)
    for layer in layers:
        layer.unmerge()


READINGS = (
    nn.Module.state_dict, lambda model: model.state_dict(keep_vars=True), copy.deepcopy, repr, pickle.dumps,
    _merged_for_a_while, lambda model: model.load_state_dict(model.state_dict()), lambda model: model.train().eval(),
)  # fmt: skip


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(
        a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8)
    )


PROPERTIES = (starts_at_the_base, merges_and_back, saves_and_loads, reading_changes_nothing)


def campaign(count: int, seed: int) -> list[str]:
    """The cases, of `count`, in which a property does not hold."""
    rng = random.Random(seed)
    wrong = []
    for number in range(count):
        base, model, x, settings = drawn(rng)
        for holds in PROPERTIES:
            if not holds(base, model, x):
                wrong.append(f"case {number}: {holds.__name__} with {settings}, {base.first.weight.dtype}, {base}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.properties", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.monotonic()
    wrong = campaign(args.count, args.seed)
    print("\n".join(wrong[:20]))
    print(f"seed {args.seed}: {args.count} models, {len(PROPERTIES)} properties each, {len(wrong)} wrong, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
