"""The traffic model: which passes over memory an implementation makes, and how long they must take.

A pass is one kernel: the bytes it reads and writes once, and its floating-point operations. It takes as long as the
slower of the two at the device's measured ceilings, and an implementation as long as its passes. Tensors as large as
X (M, K) or Y (M, N) decide; those of rank R are counted too. A read that a cache serves is not seen here: a row faster
than its prediction says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import TRAIN, Case
from benchmarks.measure import interleave, summary

SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured: bytes per second (read plus written) and FLOP per second by dtype."""

    bytes_per_s: float
    flops_per_s: dict[str, float]


@dataclass(frozen=True)
class Pass:
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Prediction:
    seconds: float
    bytes: float
    launches: int


def passes(case: Case, contender: str, direction: str) -> list[Pass]:
    """The passes of `contender` (a contender or path; `+compiled` behind it), forward or forward and backward."""
    name = contender.removesuffix("+compiled")
    forward, backward = _PLANS["eager+compiled" if name == "eager" != contender else name](case)
    return forward + backward if direction == TRAIN else forward


def predict(case: Case, contender: str, direction: str, ceilings: Ceilings) -> Prediction:
    """Seconds, bytes and launches that the model expects."""
    found = passes(case, contender, direction)
    peak = ceilings.flops_per_s[case.dtype]
    seconds = sum(max(one.bytes / ceilings.bytes_per_s, one.flops / peak) for one in found)
    return Prediction(seconds, sum(one.bytes for one in found), len(found))


def useful_flops(case: Case, direction: str, lora: bool = True) -> float:
    """Operations of the function itself, whoever computes it; no gradient for the frozen weight."""
    base, rank = 2.0 * case.M * case.N * case.K, 2.0 * case.M * case.R * (case.N + case.K)
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
    return Ceilings(2 * source.numel() / times["copy"], flops)


def _product(case: Case, rows: int, inner: int, columns: int, size: int | None = None, extra: float = 0.0) -> Pass:
    """One matrix product (rows, inner) @ (inner, columns), each operand read once, the result written once."""
    size = SIZE[case.dtype] if size is None else size
    return Pass(size * (rows * inner + inner * columns + rows * columns) + extra, 2.0 * rows * inner * columns)


def _base(case: Case) -> tuple[list[Pass], list[Pass]]:
    M, N, K = case.M, case.N, case.K
    return [_product(case, M, K, N)], [_product(case, M, N, K)]


def _eager(case: Case, adapter: str | None = None, fused: bool = False) -> tuple[list[Pass], list[Pass]]:
    M, N, K, R = case.M, case.N, case.K, case.R
    e = SIZE[case.dtype]
    a = SIZE[adapter or case.dtype]
    forward, backward = _base(case)
    if a != e:  # x to the adapters' dtype, its gradient back
        forward.append(Pass(M * K * (e + a)))
        backward.append(Pass(M * K * (e + a)))
    if case.dropout:  # a byte of mask per element
        forward.append(Pass(M * K * (2 * a + 1)))
        backward.append(Pass(M * K * (2 * a + 1)))
    forward += [_product(case, M, K, R, a), _product(case, M, R, N, a)]
    forward += [Pass(M * N * (a + 2 * e))] if fused else [Pass(2 * M * N * a), Pass(M * N * (a + e + max(a, e)))]
    if a != e and not fused:  # the sum in the wider dtype, then back
        forward.append(Pass(M * N * (a + e)))
        backward.append(Pass(M * N * (a + e)))
    backward += [
        Pass(M * N * (e + a)),  # scaling
        _product(case, N, M, R, a),
        _product(case, M, N, R, a),
        _product(case, R, M, K, a),
        _product(case, M, R, K, a),
        Pass(3 * M * K * e),
    ]
    return forward, backward


def _optimised(case: Case) -> tuple[list[Pass], list[Pass]]:
    M, N, K, R = case.M, case.N, case.K, case.R
    e = SIZE[case.dtype]
    forward, backward = _base(case)
    if case.dropout:
        forward.append(Pass(M * K * (2 * e + 1)))
    forward += [_product(case, M, K, R), _product(case, M, R, N, extra=M * N * e)]
    backward += [_product(case, M, N, R), _product(case, N, M, R), _product(case, R, M, K)]
    if case.dropout:
        backward += [_product(case, M, R, K), Pass(M * K * (2 * e + 1)), Pass(3 * M * K * e)]
    else:
        backward.append(_product(case, M, R, K, extra=M * K * e))
    return forward, backward


def _rank_tail(case: Case, rows: int, inner: int, columns: int, extra: float = 0.0) -> Pass:
    """A large product with R more columns in its inner loop, and `extra` bytes of rank R."""
    return _product(case, rows, inner + case.R, columns, extra=extra)


def _split(case: Case) -> tuple[list[Pass], list[Pass]]:
    M, N, K, R = case.M, case.N, case.K, case.R
    e = SIZE[case.dtype]
    both = Pass(e * (M * N + 2 * N * R + 2 * M * R), 4.0 * M * N * R)  # dS and dB from one read of dY
    forward = [_product(case, M, K, R), _rank_tail(case, M, K, N)]
    return forward, [both, _product(case, R, M, K), _rank_tail(case, M, N, K)]


def _folded(case: Case) -> tuple[list[Pass], list[Pass]]:
    """One launch each way: what streams beside the GEMM costs bytes, which count where they are the longer."""
    M, N, K, R = case.M, case.N, case.K, case.R
    e = SIZE[case.dtype]
    forward = Pass(e * (2 * M * K + N * K + M * N), 2.0 * M * (N * (K + R) + R * K))
    backward = Pass(e * (3 * M * N + 2 * M * K + N * K), 2.0 * M * (K * (N + R) + R * (2 * N + K)))
    return [forward], [backward]


def _onepass(case: Case) -> tuple[list[Pass], list[Pass]]:
    _, backward = _split(case)
    M, N, K, R = case.M, case.N, case.K, case.R
    both = Pass(SIZE[case.dtype] * (M * K + N * K + M * N + R * (K + N + M)), 2.0 * M * (N * K + R * (K + N)))
    return [both], backward


def _cpu(case: Case) -> tuple[list[Pass], list[Pass]]:
    M, N, K, R = case.M, case.N, case.K, case.R
    e = SIZE[case.dtype]
    forward, backward = _base(case)
    forward.append(Pass(e * (M * K + 2 * M * N), 2.0 * M * R * (K + N)))
    backward.append(Pass(e * (M * N + 3 * M * K), 4.0 * M * R * (K + N)))
    return forward, backward


def _lorafusion(case: Case) -> tuple[list[Pass], list[Pass]]:
    M, K, e = case.M, case.K, SIZE[case.dtype]
    forward, backward = _split(case)
    if case.dropout:
        forward.insert(0, Pass(M * K * (2 * e + 1)))
        last = backward.pop()
        backward.append(Pass(last.bytes + M * K, last.flops))
    return forward, backward


_PLANS = {
    "bare": _base,
    "eager": _eager,
    "eager+compiled": lambda case: _eager(case, fused=True),
    "peft": _eager,
    "peft-float32": lambda case: _eager(case, adapter="float32"),
    "optimised": _optimised,
    "lorafusion": _lorafusion,
    "torch": _optimised,
    "cpu": _cpu,
    "onepass": _onepass,
    "split": _split,
    "cuda": _folded,
}
