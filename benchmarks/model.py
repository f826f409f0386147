"""The traffic model: `fastlora.roofline` for the cases of the suite, with the plans of those whom we are compared with.

Its numbers are predictions, at ceilings that are measured on the device before the suite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import several
from benchmarks.cases import TRAIN, Case
from benchmarks.measure import interleave, summary
from fastlora.node import NODE
from fastlora.roofline import PATHS, Machine, Pass, Passes, Work, aten, base, product, seconds, split

SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
Ceilings = Machine


@dataclass(frozen=True)
class Prediction:
    seconds: float
    bytes: float
    launches: int


def passes(case: Case, contender: str, direction: str) -> list[Pass]:
    """The passes of `contender` (a contender or path; `+compiled` behind it), forward or forward and backward."""
    name = contender.removesuffix("+compiled")
    work = Work(case.M, case.N, case.K, case.R, SIZE[case.dtype], case.dropout > 0)
    plan = _PLANS["eager+compiled" if name == "eager" != contender else name]
    if case.several:
        plan = partial(several.passes, case, name, plan=plan)
    forward, backward = plan(replace(work, dropout=work.dropout and not case.dora))  # DoRA drops elements of x itself
    if case.dora and name != "bare":
        more = _dora(work, name)
        forward, backward = forward + more[0], backward + more[1]
    if case.base:  # half a byte and a 64th for each number of the weight, which is written for the product
        dequantise = Pass(work.N * work.K * (0.5 + 1 / 64 + work.size), triton=True)
        forward, backward = [dequantise, *forward], [dequantise, *backward]
    return forward + backward if direction == TRAIN else forward


def predict(case: Case, contender: str, direction: str, ceilings: Ceilings, captured: bool = True) -> Prediction:
    """Seconds, bytes and launches that the model expects; not `captured`: with the host's part."""
    found = passes(case, contender, direction)
    expected = seconds(found, ceilings, case.dtype, captured, node=NODE is not None)
    return Prediction(expected, sum(one.bytes for one in found), len(found))


def useful_flops(case: Case, direction: str, lora: bool = True) -> float:
    """Operations of the function itself, whoever computes it; no gradient for the frozen weight."""
    rows = case.M * case.projections
    base, rank = 2.0 * rows * case.N * case.K, 2.0 * rows * case.R * (case.N + case.K)
    if direction == TRAIN:
        return 2 * base + (3 * rank if lora else 0.0)
    return base + (rank if lora else 0.0)


def measure_ceilings(device: torch.device, budget_s: float = 4.0) -> Ceilings:
    """Time a large copy, and a large product in each dtype on random data."""
    cuda = device.type == "cuda"
    source = torch.empty((1 << 30) if cuda else (1 << 26), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    products = {}
    for dtype in SIZE:
        size = (8192 if dtype != "float32" else 4096) if cuda else (1024 if dtype != "float16" else 256)
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        products[dtype] = (lambda a=a: a @ a, 2.0 * size**3)
    calls = {"copy": lambda: target.copy_(source), **{dtype: call for dtype, (call, _) in products.items()}}
    times = {name: summary(seconds)["p20"] for name, seconds in interleave(calls, budget_s, device=device).items()}
    flops = {dtype: operations / times[dtype] for dtype, (_, operations) in products.items()}
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
    return Ceilings(2 * source.numel() / times["copy"], flops, multiprocessors)


def _eager(work: Work, adapter_size: int = 0, fused: bool = False) -> Passes:
    M, N, K, R, e = work.M, work.N, work.K, work.R, work.size
    a = adapter_size or e
    wide = replace(work, size=a)
    forward, backward = base(work)
    if a != e:  # x to the adapters' dtype, its gradient back
        forward.append(Pass(M * K * (e + a)))
        backward.append(Pass(M * K * (e + a)))
    if work.dropout:  # a byte of mask per element
        forward.append(Pass(M * K * (2 * a + 1)))
        backward.append(Pass(M * K * (2 * a + 1)))
    forward += [product(wide, M, K, R), product(wide, M, R, N)]
    forward += [Pass(M * N * (a + 2 * e))] if fused else [Pass(2 * M * N * a), Pass(M * N * (a + e + max(a, e)))]
    if a != e and not fused:  # the sum in the wider dtype, then back
        forward.append(Pass(M * N * (a + e)))
        backward.append(Pass(M * N * (a + e)))
    backward += [
        Pass(M * N * (e + a)),  # scaling
        product(wide, N, M, R),
        product(wide, M, N, R),
        product(wide, R, M, K),
        product(wide, M, R, K),
        Pass(3 * M * K * e),
    ]
    return forward, backward


def _dora(work: Work, path: str) -> Passes:
    """What DoRA adds to a path of ours: the norms' read of the weight, and the magnitude's passes."""
    if path not in PATHS:
        raise KeyError(path)
    M, N, K, e = work.M, work.N, work.K, work.size
    forward, backward = [product(work, N, K, work.R), Pass(2 * M * N * e)], [Pass(3 * M * N * e)]
    if work.dropout:  # of x itself; the base's product of the rest is apart
        forward += [Pass(M * K * (2 * e + 1)), Pass(3 * M * K * e), *base(work)[0], Pass(3 * M * N * e)]
        backward += [*base(work)[1], Pass(M * K * (2 * e + 1)), Pass(3 * M * K * e)]
    return forward, backward


def _lorafusion(work: Work) -> Passes:
    M, K, e = work.M, work.K, work.size
    forward, backward = split(work)
    if work.dropout:
        forward.insert(0, Pass(M * K * (2 * e + 1)))
        backward[-1] = replace(backward[-1], bytes=backward[-1].bytes + M * K)
    return forward, backward


def _optimised(work: Work) -> Passes:
    """Path `torch` with the dropped x and a mask of a byte an element kept from forward."""
    M, K, R, e = work.M, work.K, work.R, work.size
    forward, backward = aten(replace(work, dropout=False))
    if work.dropout:
        forward.insert(0, Pass(M * K * (2 * e + 1)))
        backward[-1:] = [product(work, M, R, K), Pass(M * K * (2 * e + 1)), Pass(3 * M * K * e)]
    return forward, backward


_PLANS = PATHS | {
    "bare": base,
    "eager": _eager,
    "eager+compiled": lambda work: _eager(work, fused=True),
    "peft": _eager,
    "peft-float32": lambda work: _eager(work, adapter_size=4),
    "optimised": _optimised,
    "lorafusion": _lorafusion,
}
