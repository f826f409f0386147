"""The autograd node in C++ (csrc/node.cpp), or None: compiled at install for one version of torch, and optional.

It takes ordinary calls whole, forward and backward, and leaves the others to `fastlora.autograd` by returning None.
Path `cpu` it knows; of the others it does what it was shown: the first call of a kind runs in Python, here, and its
record is handed over.
"""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastlora.paths.path import Path
from fastlora.paths.problem import Update
from fastlora.paths.shared import Gradients, Made, Needs, Projection, Shared
from fastlora.record import observe


def _load() -> ModuleType | None:
    """What was compiled for this very version of torch, or None: another version's would not even load safely."""
    try:
        return importlib.import_module("fastlora._node_" + re.sub(r"\W", "_", torch.__version__))
    except ImportError:
        return None


NODE = _load()


def _records(path: Path, x: Tensor) -> bool:
    """Whether all that `path` does is Triton's launches and ATen's operations, or these alone."""
    return NODE is not None and (path.fingerprint is None or (x.is_cuda and path.launches is not None))


def _compare_seeds(x: Tensor, p: float) -> None:
    if p > 0.0 and x.is_cuda and not torch.cuda.is_current_stream_capturing() and _seeds_agree(x.device):
        NODE.trust_randint(x.device.index)


@cache
def _seeds_agree(device: torch.device) -> bool:
    """Whether the seeds that csrc/seeds.h computes for a GPU are those that torch draws there: looked at once."""
    seed, computed, drawn = 0x0123_4567_89AB_CDEF, [], []
    with suppress(RuntimeError):  # no memory, or a user who forbids that the host waits
        generator = torch.Generator(device).manual_seed(seed)
        for size in ((4, 2), (), (3, 2), (2, 2)):
            computed.append([NODE.randint(seed, generator.get_offset(), i) for i in range(torch.Size(size).numel())])
            drawn.append(torch.randint(2**63 - 1, size, generator=generator, device=device).flatten().tolist())
        return computed == drawn and generator.get_offset() == 4 * len(drawn)
    return False


def forward(path: Path, x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
    """`path.forward`, recorded where the node has use for it."""
    lora_A, lora_B, scaling, p, seed, bank = update
    inputs = (x, weight, lora_A, lora_B, bias, seed)
    if bank is not None or not _records(path, x) or not NODE.lacks(path, inputs, scaling, p, False):
        return path.forward(x, weight, bias, update)
    found, record, _ = observe(lambda: path.forward(x, weight, bias, update), inputs, (True, True))
    NODE.keep(path, inputs, scaling, p, False, record)
    _compare_seeds(x, p)
    return found


def backward(path: Path, dy: Tensor, x, weight, S: Tensor, update: Update, need_B: bool, given: Tensor):
    """`path.backward`, recorded where the node has use for it; `given` is dy (..., N) before its rows were counted."""
    lora_A, lora_B, scaling, p, seed, bank = update
    inputs = (given, x, weight, lora_A, lora_B, S, seed)
    if bank is not None or not _records(path, dy) or not NODE.lacks(path, inputs, scaling, p, need_B):
        return path.backward(dy, x, weight, S, update, need_B)
    wanted = (weight is not None, x is not None, need_B)
    found, record, _ = observe(lambda: path.backward(dy, x, weight, S, update, need_B), inputs, wanted)
    NODE.keep(path, inputs, scaling, p, need_B, record)
    return found


def forward_shared(path: Path, shared: Shared, x: Tensor, many: list[Projection]) -> Made:
    """`shared.forward`, recorded where the node has use for it. An input's slot: x, then five for each projection."""
    inputs = (x, *(t for weight, bias, u in many for t in (weight, u.lora_A, u.lora_B, bias, u.seed)))
    call = path, inputs, tuple(one.update.scaling for one in many), many[0].update.dropout_p, None
    if not _records(path, x) or not NODE.lacks_shared(*call):
        return shared.forward(x, many)

    def flat() -> tuple[Tensor, ...]:
        ys, Ss = shared.forward(x, many)
        return (*ys, *Ss)

    found, record, _ = observe(flat, inputs, (True,) * 2 * len(many))
    NODE.keep_shared(*call, record)
    _compare_seeds(x, call[3])
    return list(found[: len(many)]), list(found[len(many) :])


def backward_shared(
    path: Path, shared: Shared, dys: list[Tensor], x, many: list[Projection], Ss: list[Tensor], needs: Needs, given
) -> Gradients:
    """`shared.backward` likewise: x, then six for each; `given` are the dy (..., N) before their rows were counted."""
    n = len(many)
    each = zip(given, Ss, many, strict=True)
    inputs = (x, *(t for dy, S, (weight, _, u) in each for t in (dy, weight, u.lora_A, u.lora_B, S, u.seed)))
    wanted = (needs.x, *needs.A, *needs.B)
    call = path, inputs, tuple(one.update.scaling for one in many), many[0].update.dropout_p, wanted
    several = len({dy.data_ptr() for dy in given}) < n  # at one place, as a sum's are: others that come are not
    if several or not _records(path, dys[0]) or not NODE.lacks_shared(*call):
        return shared.backward(dys, x, many, Ss, needs)

    def flat() -> tuple[Tensor | None, ...]:
        dx, dAs, dBs = shared.backward(dys, x, many, Ss, needs)
        return (dx, *dAs, *dBs)

    found, record, _ = observe(flat, inputs, wanted)
    NODE.keep_shared(*call, record)
    return found[0], list(found[1 : n + 1]), list(found[n + 1 :])
