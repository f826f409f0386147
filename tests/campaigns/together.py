"""Random projections that share x, `lora_linears` held against the reference: sizes, dtypes, layouts, masks.

    python -m tests.campaigns.together --count 20000 --seed 1
    TRITON_INTERPRET=1 python -m tests.campaigns.together --kernels --count 500

Each line of a failure names the seed that draws it again.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from dataclasses import replace

import torch

from fastlora import accuracy, lora_linears
from fastlora.choice import select
from fastlora.paths.problem import draw_seeds

from .case import KERNELS, Case, draw, tensors
from .observe import forced


def drawn(seed: int, paths: tuple[str | None, ...]) -> tuple[Case, list[accuracy.Inputs]]:
    """Two to five projections of one x, and the case of the first."""
    rng = random.Random(seed)
    case = draw(rng, paths, ("function",))
    while 0 in (*case.lead, case.N, case.K):
        case = draw(rng, paths, ("function",))
    case = replace(case, mode="plain", scaling_is="float", special=(), wants="XABb")
    many = []
    for i in range(rng.choice((2, 2, 3, 3, 4, 5))):
        other = replace(case, seed=case.seed + i, N=rng.choice((case.N, 3, 17)), bias=rng.random() < 0.5)
        other = replace(other, R=rng.choice((case.R, 1, 8)), scaling=rng.choice((case.scaling, 2.0)))
        many.append(tensors(other))
    return case, [replace(one, x=many[0].x, dropout_p=case.dropout) for one in many]


def faults(seed: int, paths: tuple[str | None, ...]) -> list[str]:
    case, many = drawn(seed, paths)
    x, p = many[0].x, case.dropout
    torch.set_num_threads(case.threads)
    with forced(case.path):
        if p:
            chosen = select(x, many[0].weight, many[0].lora_A, p, case.path)
            torch.manual_seed(seed)
            M, K = x.shape[:-1].numel(), x.shape[-1]
            masks = [chosen.mask(seed, M, K, p) for seed in draw_seeds(x.device, len(many))]
            many = [replace(one, mask=mask.view(x.shape)) for one, mask in zip(many, masks, strict=True)]
        # a term for each rank, and sums of n terms in another order: see `observe._judged`
        longest = max(x.shape[:-1].numel(), x.shape[-1], *(one.weight.shape[0] for one in many))
        terms = sum(one.lora_A.shape[0] for one in many) + longest * (case.dtype in ("f32", "f64"))
        torch.manual_seed(seed)
        return accuracy.shared_violations(lora_linears, many, units=2.0 + terms / 2 * (case.dtype in ("f32", "f64")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.together", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kernels", action="store_true", help="the Triton paths, in the interpreter")
    args = parser.parse_args(argv)
    paths, wrong = KERNELS if args.kernels else (None, "torch", "cpu"), 0
    for seed in range(args.seed * 10**6, args.seed * 10**6 + args.count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = faults(seed, paths)
        except RuntimeError as error:
            found = [] if "cannot run here" in str(error) else [str(error)]
        if found:
            wrong += 1
            print(f"seed {seed}: {drawn(seed, paths)[0]}: {found[0]}", flush=True)
    print(f"{args.count} calls of several projections, {wrong} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
