"""The autograd node in C++ (csrc/node.cpp), or None: compiled at install for one version of torch, and optional.

It takes ordinary calls whole, forward and backward, and leaves the others to `fastlora.autograd` by returning None.
Path `cpu` it knows; of the others it does what it was shown: calls of a new kind run in Python, here, and the record of
one of them is handed over (on a GPU of the first, on a CPU of the second).
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor

from fastlora.paths.path import Path
from fastlora.paths.shared import Gradients, Made, Needs, Projection, gradients, made
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


_compared: set[torch.device] = set()


def _compare_seeds(x: Tensor, p: float) -> None:
    """Let the node write dropout's seeds on a GPU where they are torch's own, and there sooner than by a launch. It is
    looked at once, when the host may wait."""
    if NODE is None or not (p > 0.0 and x.is_cuda) or x.device in _compared:
        return
    if torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode():
        return
    with suppress(Exception):  # no memory, say: another time
        serve = _seeds_agree(x.device) and _seeds_are_sooner(x.device)
        _compared.add(x.device)
        if serve:
            NODE.trust_seeds(x.device.index)


def _seeds_agree(device: torch.device) -> bool:
    written, drawn = (torch.Generator(device).manual_seed(0x0123_4567_89AB_CDEF) for _ in range(2))
    found = []
    for size in ((4, 2), (), (3, 2)):  # what one call draws, or one of several projections
        mine = torch.empty(size, dtype=torch.int64, device=device)
        if not NODE.write_seeds(written, mine):
            return False
        both = mine, torch.randint(2**63 - 1, size, generator=drawn, device=device)
        found.append(torch.stack([t.flatten()[::2] for t in both]))
    mine, theirs = torch.cat(found, 1).tolist()
    return mine == theirs and written.get_offset() == drawn.get_offset()


def _seeds_are_sooner(device: torch.device) -> bool:
    generator, made = torch.Generator(device), torch.empty((), dtype=torch.int64, device=device)

    def seconds(draw: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(50):
            draw()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began

    ways = (lambda: NODE.write_seeds(generator, made)), (lambda: made.random_(generator=generator))
    written, launched = (min(seconds(way), seconds(way)) for way in ways)
    return written < launched


def forward(path: Path, x: Tensor, many: list[Projection]) -> Made:
    """y and S of each by `path`, recorded where the node has use for it. An input's slot: x, then five of each."""
    first = many[0].update
    _compare_seeds(x, first.dropout_p)
    if first.bank is not None or not _records(path, x):
        return made(path, x, many)
    inputs = (x, *(t for weight, bias, u in many for t in (weight, u.lora_A, u.lora_B, bias, u.seed)))
    call = path, inputs, tuple(one.update.scaling for one in many), first.dropout_p, None
    if not NODE.lacks(*call):
        return made(path, x, many)

    def flat() -> tuple[Tensor, ...]:
        ys, Ss = made(path, x, many)
        return (*ys, *Ss)

    found, record, _ = observe(flat, inputs, (True,) * 2 * len(many))
    NODE.keep(*call, record)
    return list(found[: len(many)]), list(found[len(many) :])


def backward(
    path: Path, dys: list[Tensor], x, many: list[Projection], Ss: list[Tensor], needs: Needs, given
) -> Gradients:
    """Gradients likewise: x, then six of each; `given` are the dy (..., N) before their rows were counted."""
    n, first = len(many), many[0].update
    several = len({dy.data_ptr() for dy in given}) < n  # at one place, as a sum's are: others that come are not
    if several or first.bank is not None or not _records(path, dys[0]):
        return gradients(path, dys, x, many, Ss, needs)
    each = zip(given, Ss, many, strict=True)
    inputs = (x, *(t for dy, S, (weight, _, u) in each for t in (dy, weight, u.lora_A, u.lora_B, S, u.seed)))
    wanted = (needs.x, *needs.A, *needs.B)
    call = path, inputs, tuple(one.update.scaling for one in many), first.dropout_p, wanted
    if not NODE.lacks(*call):
        return gradients(path, dys, x, many, Ss, needs)

    def flat() -> tuple[Tensor | None, ...]:
        dx, dAs, dBs = gradients(path, dys, x, many, Ss, needs)
        return (dx, *dAs, *dBs)

    found, record, _ = observe(flat, inputs, wanted)
    NODE.keep(*call, record)
    return found[0], list(found[1 : n + 1]), list(found[n + 1 :])
