"""What a step on a GPU would wait for: each path's forward and backward on tensors that stand for a GPU's, none needed.

    python -m tests.campaigns.waits

The tensors are fake: they have a shape, a dtype and the device `cuda`, and whatever needs their numbers fails. ATen's
operations are watched for those that bring a tensor to the host or take one from it; the launches of Triton kernels,
which never wait, are only counted. On a GPU `tests/gpu/test_gpu.py` asks the same of torch's sync debug mode.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels import tiles
from fastlora.paths import PATHS as ALL
from fastlora.paths import aten, mask
from fastlora.paths.problem import Update, draw_seed

PATHS = ("torch", "hybrid", "onepass", "split")
ARCHITECTURES = ((7, 5), (8, 0), (9, 0), (10, 0))
CASES = tuple(  # (M, N, K, R, dtype, adapter_dtype, dropout_p)
    (*sizes, dtype, adapter_dtype, dropout_p)
    for sizes in ((64, 96, 128, 8), (33, 53, 41, 3), (4096, 4096, 1024, 16))
    for dtype, adapter_dtype in (
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    )
    for dropout_p in (0.0, 0.1)
)


class Watch(TorchDispatchMode):
    """Names, in `seen`, the operations whose tensors lie on several devices: the host waits for such a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.seen.append(str(function))
        return found


@contextlib.contextmanager
def imaginary_gpu(capability: tuple[int, int]):
    """Fake tensors may say `cuda`, and a Triton kernel that is launched is counted in the list that this yields."""
    import triton

    launched: list[str] = []
    facts = SimpleNamespace(multi_processor_count=132)
    caches = (tiles._target_of_index, tiles._multiprocessors_of_index, aten._nothing)
    for cache in caches:
        cache.cache_clear()
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(mask, "_kernel_agrees", lambda *_: True),  # which compares numbers, once a process
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: facts),
        mock.patch.object(
            triton.runtime.jit.JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__)
        ),
        FakeTensorMode(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # a fake tensor has no address, and says so
        try:
            yield launched
        finally:
            for cache in caches:
                cache.cache_clear()


def step(path, M, N, K, R, dtype, adapter_dtype, dropout_p) -> None:
    """Forward and backward, with every gradient, on tensors that have no numbers."""
    x, weight, bias = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((M, K), (N, K), (N,)))
    lora_A, lora_B = (torch.empty(shape, dtype=adapter_dtype, device="cuda") for shape in ((R, K), (N, R)))
    update = Update(lora_A, lora_B, 2.0, dropout_p, draw_seed(x.device) if dropout_p else None)
    y, S = path.forward(x, weight, bias, update)
    path.backward(torch.empty_like(y), x, weight, S, update, True)


def waits(path, case: tuple, capability: tuple[int, int]) -> tuple[list[str], list[str]]:
    """(what would make the host wait, the Triton kernels launched) of one step."""
    with imaginary_gpu(capability) as launched, Watch() as watch:
        try:
            step(path, *case)
        except Exception as error:  # a number was asked for that a fake tensor does not have
            watch.seen.append(f"{type(error).__name__}: {error}")
    return watch.seen, launched


def main() -> int:
    argparse.ArgumentParser(prog="python -m tests.campaigns.waits", description=__doc__.splitlines()[0]).parse_args()
    wrong = 0
    for name in PATHS:
        path, steps, launches = ALL[name], 0, 0
        for capability in ARCHITECTURES:
            for case in CASES:
                found, launched = waits(path, case, capability)
                steps, launches = steps + 1, launches + len(launched)
                for what in found:
                    wrong += 1
                    print(f"{name} {case} on sm_{capability[0]}{capability[1]}: {what}")
        print(f"{name}: {steps} steps, {launches} launches of Triton kernels")
    print(f"{wrong} waits for the GPU")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
