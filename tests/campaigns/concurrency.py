"""One layer called from many threads, from forked processes and by DataLoader workers: the same bits as alone.

    python -m tests.campaigns.concurrency --threads 8 --calls 200 --forks 8 --seconds 5

Beside the callers other threads save the layer, patch and unpatch it, and change how many threads torch has.
Two CUDA streams are in `tests/gpu/test_gpu.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastlora
import fastlora.peft


def layer_and_inputs(count: int, seed: int = 0) -> tuple[fastlora.FusedLoRALinear, list[Tensor]]:
    """A layer away from its start, and inputs of different shapes and dtypes of memory."""
    torch.manual_seed(seed)
    layer = fastlora.FusedLoRALinear(24, 16, r=4, lora_alpha=8)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer, [torch.randn(1 + i % 7, 24) for i in range(count)]


def alone(layer, x: Tensor) -> tuple[Tensor, ...]:
    """(y, dA, dB) of one call."""
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y.sum(), (layer.lora_A, layer.lora_B)))


def threads(number: int, calls: int) -> int:
    """How many of `number` x `calls` concurrent forward and backward calls differ from the same calls alone."""
    layer, inputs = layer_and_inputs(calls)
    wanted = [alone(layer, x) for x in inputs]
    wrong, start = [], threading.Barrier(number)

    def work(which: int) -> None:
        start.wait()
        for i in range(calls):
            i = (i * (which + 1)) % calls
            try:
                # a BLAS may sum in another order on another thread
                got = alone(layer, inputs[i])
                same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, wanted[i], strict=True))
            except Exception as error:
                same = False
                print(f"thread {which}, call {i}: {error!r}")
            if not same:
                wrong.append((which, i))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(wrong)


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


def _trained(layer: fastlora.FusedLoRALinear) -> fastlora.FusedLoRALinear:
    nn.init.normal_(layer.lora_B)
    return layer


def _saved(layer: nn.Module) -> None:
    layer.state_dict()


def _patched(layer: nn.Module) -> None:
    fastlora.peft.unpatch(layer)
    fastlora.peft.patch(layer)


def _threads_changed(layer: nn.Module) -> None:
    torch.set_num_threads(1 if torch.get_num_threads() == 2 else 2)


# Who else is there, and a layer that is being called meanwhile; large enough that the CPU's kernels share it out.
NEIGHBOURS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]] = {
    "a square Conv1D is saved": (_square_conv1d, _saved),
    "a merged layer is saved": (_merged, _saved),
    "a PEFT layer is unpatched and patched": (_peft, _patched),
    "torch's threads change": (_square_conv1d, _threads_changed),
}


def neighbours(name: str, seconds: float, callers: int = 2) -> tuple[int, int]:
    """(calls, those that raised or gave something else than alone) while another thread does what `name` says."""
    make, act = NEIGHBOURS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(300, 96)
    wanted = layer(x).detach()
    end, calls, wrong = time.monotonic() + seconds, [0] * callers, []
    interval, before = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)  # so that threads take turns within calls

    def call(which: int) -> None:
        while time.monotonic() < end:
            calls[which] += 1
            try:
                y = layer(x)
                if y.requires_grad:  # a merged layer does not learn
                    y.sum().backward()
                if not torch.allclose(y, wanted, rtol=1e-4, atol=1e-4):
                    wrong.append("another output")
            except Exception as error:
                wrong.append(repr(error))

    def disturb() -> None:
        while time.monotonic() < end:
            act(layer)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    workers.append(threading.Thread(target=disturb))
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(before)
    for what in sorted(set(wrong)):
        print(f"{name}: {what}")
    return sum(calls), len(wrong)


def forks(number: int, seconds: float = 60.0) -> int:
    """How many of `number` processes, forked after the layer was used, die, hang or compute something else."""
    layer, inputs = layer_and_inputs(20)
    wanted = [alone(layer, x) for x in inputs]
    children = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, where other threads are alive
        for _ in range(number):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    torch.set_num_threads(1)
                    same = all(
                        torch.equal(a, b)
                        for x, w in zip(inputs, wanted, strict=True)
                        for a, b in zip(alone(layer, x), w, strict=True)
                    )
                    status = 0 if same else 3
                finally:
                    os._exit(status)
            children.append(child)
    wrong, end = 0, time.monotonic() + seconds
    for child in children:
        pid, status = 0, 0
        while not pid and time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not pid:
            os.kill(child, 9)
            os.waitpid(child, 0)
        wrong += not pid or status != 0
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
