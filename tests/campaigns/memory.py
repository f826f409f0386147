"""What a layer keeps for backward, to the byte, and what a thousand steps leave behind.

    python -m tests.campaigns.memory --steps 1000 --seed 1

On a GPU, `tests/gpu/test_gpu.py` asks the same of the allocator, and that no step waits for the host.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from dataclasses import replace

import torch

from .case import Case, draw, tensors
from .observe import Face

KINDS = ("function", "layer", "peft")


def kept_bytes(case: Case) -> tuple[int, int]:
    """(bytes kept for backward beside x and the parameters, bytes of S and of dropout's seed) of one forward."""
    inputs = replace(tensors(case), dropout_p=case.dropout)
    face = Face(case, inputs, None)
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = face(face.leaves["X"])
    assert y.requires_grad
    own = [*face.leaves.values(), inputs.weight]
    for t in own:
        storages.pop(t.untyped_storage().data_ptr(), None)
    M = inputs.x.shape[:-1].numel()
    return sum(storages.values()), M * case.R * inputs.x.element_size() + (8 if case.dropout else 0)


def random_case(rng: random.Random) -> Case:
    """A case whose call keeps something: all leaves ask for gradients, and nothing is empty."""
    while True:
        case = draw(rng, (None,), KINDS)
        if case.mode == "plain" and 0 not in case.lead and case.N and case.K:
            return Case(seed=case.seed, face=case.face, lead=case.lead, N=case.N, K=case.K, R=case.R,
                        dtype=case.dtype, dropout=case.dropout, bias=case.bias)  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def live() -> int:
    """Tensors that Python can reach."""
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())  # o.__class__ may run anything


def steps(count: int, kind: str, warm: int = 500) -> tuple[int, int]:
    """(bytes, tensors) more after `count` training steps of a layer with dropout than after `warm` ones.

    The allocator's own pools, some MiB, fill within the first hundreds."""
    case = Case(face=kind, lead=(64, 4), N=256, K=192, R=8, bias=True, dropout=0.1, scaling=2.0)
    inputs = replace(tensors(case), dropout_p=case.dropout)
    face = Face(case, inputs, None)
    optimiser = torch.optim.AdamW([face.leaves["A"], face.leaves["B"]], lr=1e-4)

    def step():
        x = inputs.x + 0.0
        face(x.requires_grad_()).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    for _ in range(warm):
        step()
    before = resident(), live()
    for _ in range(count):
        step()
    after = resident(), live()
    return after[0] - before[0], after[1] - before[1]


class _Refused(Exception):
    """What the hooks of `broken_steps` raise."""


def broken_steps(count: int, seed: int) -> int:
    """Tensors more after `count` steps that end in an error: a wrong shape, or a hook that raises on the way."""
    rng = random.Random(seed)
    case = Case(lead=(64, 4), N=256, K=192, R=8, bias=True, dropout=0.1)
    face = Face(case, replace(tensors(case), dropout_p=case.dropout), None)

    def refuse(_):
        raise _Refused

    def step() -> None:
        x = torch.randn(rng.randrange(1, 300), 192, requires_grad=True)
        kind = rng.choice(("shape", "forward", "backward", "gradient"))
        try:
            if kind == "shape":
                face(x[:, 1:])
            elif kind == "forward":
                with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
                    face(x)
            elif kind == "backward":
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t, refuse):
                    face(x).sum().backward()
            else:
                y = face(x)
                y.register_hook(refuse)
                y.sum().backward()
        except (_Refused, ValueError):
            return
        raise AssertionError(f"a step with a broken {kind} ended well")

    for _ in range(20):
        step()
    before = live()
    for _ in range(count):
        step()
    return live() - before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, rng, wrong = time.monotonic(), random.Random(args.seed), 0
    for _ in range(args.layers):
        case = random_case(rng)
        kept, wanted = kept_bytes(case)
        if kept != wanted:
            wrong += 1
            print(f"{case} keeps {kept} bytes, not {wanted}")
    print(f"seed {args.seed}: {args.layers} layers keep S (and dropout's 8 bytes) and nothing else; {wrong} wrong")
    for kind in KINDS:
        more, tensors_more = steps(args.steps, kind)
        print(f"{kind}: {args.steps} steps, {more / 2**20:+.2f} MiB resident, {tensors_more:+d} tensors")
        wrong += more > 2 * 2**20 or tensors_more > 0
    left = broken_steps(args.steps, args.seed)
    print(f"{args.steps} steps that end in an error: {left:+d} tensors")
    wrong += left > 0
    print(f"{time.monotonic() - began:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
