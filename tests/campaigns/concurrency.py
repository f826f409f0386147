"""One layer called from many threads, from forked processes and by DataLoader workers: the same results as alone.

    python -m tests.campaigns.concurrency --threads 8 --calls 200 --forks 8 --seconds 5

Beside the callers other threads save the layer, patch and unpatch it, and change how many threads torch has.
Two CUDA streams are in `tests/gpu/test_gpu.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastlora
import fastlora.peft


def layer_and_inputs(count: int, seed: int = 0) -> tuple[fastlora.FusedLoRALinear, list[Tensor]]:
    """A layer away from its start, and inputs of different shapes."""
    torch.manual_seed(seed)
    return _trained(fastlora.FusedLoRALinear(24, 16, r=4)), [torch.randn(1 + i % 7, 24) for i in range(count)]


def alone(layer, x: Tensor) -> tuple[Tensor, ...]:
    """(y, dA, dB) of one call."""
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y.sum(), (layer.lora_A, layer.lora_B)))


def close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    """A BLAS may sum in another order on another thread."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def threads(number: int, calls: int) -> int:
    """How many of `number` x `calls` concurrent forward and backward calls differ from the same calls alone."""
    layer, inputs = layer_and_inputs(calls)
    wanted = [alone(layer, x) for x in inputs]

    def work(which: int) -> int:
        order = [i * (which + 1) % calls for i in range(calls)]
        return sum(not close(alone(layer, inputs[i]), wanted[i]) for i in order)

    with ThreadPoolExecutor(number) as pool:
        return sum(pool.map(work, range(number)))


def _trained(layer: fastlora.FusedLoRALinear) -> fastlora.FusedLoRALinear:
    nn.init.normal_(layer.lora_B)
    return layer


def _square_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return _trained(fastlora.FusedLoRALinear.from_linear(Conv1D(96, 96), r=16))


def _merged() -> nn.Module:
    layer = _trained(fastlora.FusedLoRALinear(96, 96, r=16))
    layer.merge()
    return layer


def _peft() -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(96, 96).requires_grad_(False)
    return Linear(base, "default", LoraConfig(r=16, init_lora_weights=False), r=16, lora_alpha=16)


def _patched(layer: nn.Module) -> None:
    fastlora.peft.unpatch(layer)
    fastlora.peft.patch(layer)


def _threads_changed(layer: nn.Module) -> None:
    torch.set_num_threads(1 if torch.get_num_threads() == 2 else 2)


# Who else is there, and a layer that is being called meanwhile; large enough that the CPU's kernels share it out.
NEIGHBOURS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "a square Conv1D is saved": (_square_conv1d, nn.Module.state_dict),
    "a merged layer is saved": (_merged, nn.Module.state_dict),
    "a PEFT layer is unpatched and patched": (_peft, _patched),
    "torch's threads change": (_square_conv1d, _threads_changed),
}


def neighbours(name: str, seconds: float, callers: int = 2) -> tuple[int, int]:
    """(calls, those that raised or gave something else than alone) while another thread does what `name` says."""
    make, act = NEIGHBOURS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(300, 96)
    wanted = layer(x).detach()
    end, interval, before = time.monotonic() + seconds, sys.getswitchinterval(), torch.get_num_threads()

    def call() -> list[str]:
        found = []
        while time.monotonic() < end:
            try:
                y = layer(x)
                if y.requires_grad:  # a merged layer does not learn
                    y.sum().backward()
                found.append("" if torch.allclose(y, wanted, rtol=1e-4, atol=1e-4) else "another output")
            except Exception as error:
                found.append(repr(error))
        return found

    def disturb() -> None:
        while time.monotonic() < end:
            act(layer)

    sys.setswitchinterval(1e-5)  # so that threads take turns within calls
    try:
        with ThreadPoolExecutor() as pool:
            calls, disturbed = [pool.submit(call) for _ in range(callers)], pool.submit(disturb)
        disturbed.result()
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(before)
    said = [what for one in calls for what in one.result()]
    for what in sorted({*said} - {""}):
        print(f"{name}: {what}")
    return len(said), sum(map(bool, said))


def forks(number: int, seconds: float = 60.0) -> int:
    """How many of `number` processes, forked after the layer was used, die, hang or compute something else."""
    layer, inputs = layer_and_inputs(20)
    wanted = [alone(layer, x) for x in inputs]

    def work() -> None:
        torch.set_num_threads(1)
        sys.exit(not all(close(alone(layer, x), w) for x, w in zip(inputs, wanted, strict=True)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, where other threads are alive
        children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(number)]
        for child in children:
            child.start()
    end, wrong = time.monotonic() + seconds, 0
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        wrong += child.exitcode != 0
        child.kill()
        child.join()
    return wrong


class Features(Dataset):
    """What a layer makes of each input, made in the loader's worker."""

    def __init__(self, layer, inputs):
        self.layer, self.inputs = layer, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.layer(self.inputs[index])


def workers(number: int, rows: int, method: str) -> int:
    """How many rows differ that DataLoader workers, started by `method`, compute with the layer."""
    layer, inputs = layer_and_inputs(rows)
    layer(inputs[0])
    loader = DataLoader(Features(layer, inputs), batch_size=None, num_workers=number, multiprocessing_context=method)
    return sum(not torch.equal(got, alone(layer, x)[0]) for got, x in zip(loader, inputs, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.concurrency", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--forks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each neighbour")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wrong = {
        f"{args.threads} threads x {args.calls} calls": threads(args.threads, args.calls),
        f"{args.forks} processes forked after use": forks(args.forks),
        "2 forked DataLoader workers, 100 rows": workers(2, 100, "fork"),
        "2 spawned DataLoader workers, 20 rows": workers(2, 20, "spawn"),
    }
    for name in NEIGHBOURS:
        calls, number = neighbours(name, args.seconds)
        wrong[f"{calls} calls while {name}"] = number
    for what, number in wrong.items():
        print(f"{what}: {number} wrong")
    return bool(sum(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
