"""How long a path must take: a prediction, for shapes that nobody has timed. Rates are data sheets', or guesses.

A pass is one kernel: the bytes that it reads and writes once, and its operations. It takes as long as the slower of the
two, and a product no less than its waves of tiles over the multiprocessors. A path takes as long as its passes; where
the host launches them one by one, no less than the host takes. Tensors as large as X (M, K) or Y (M, N) decide; those
of rank R are counted too. A read that a cache serves is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastlora.paths.problem import Problem

TILE = 128  # rows and columns of the product that one program makes, in whose waves a product is counted
SMALL_TILE = 64  # of path `onepass`
# Beside ATen's products: Triton's large tiles, its float32; `onepass` and `cuda`, guessed from an H100's slower times.
GEMM_RATE, FLOAT_RATE, SMALL_RATE, FOLDED_RATE = 0.95, 0.5, 0.05, 0.5
# Seconds of the host for a launch: ATen's operations; Triton's launcher from Python, and from the node in C++.
ATEN_S, PYTHON_S, NODE_S = 5e-6, 25e-6, 3e-6


@dataclass(frozen=True)
class Machine:
    """What a device can do: bytes per second (read plus written), FLOP per second by dtype, multiprocessors (0: waves
    are not counted)."""

    bytes_per_s: float
    flops_per_s: dict[str, float]
    multiprocessors: int = 0


def _card(terabytes: float, half: float, tf32: float, single: float, multiprocessors: int) -> Machine:
    rates = {"float16": half, "bfloat16": half, "tf32": tf32, "float32": single}
    return Machine(terabytes * 1e12, {dtype: rate * 1e12 for dtype, rate in rates.items()}, multiprocessors)


# The usual card of each architecture, dense rates as its maker's data sheet states them.
NOMINAL: dict[int | str, Machine] = {
    75: _card(0.32, 65, 8.1, 8.1, 40),  # T4
    80: _card(2.04, 312, 156, 19.5, 108),  # A100 80 GB
    86: _card(0.77, 155, 77, 38.7, 84),  # RTX A6000
    89: _card(1.01, 165, 82.6, 82.6, 128),  # RTX 4090
    90: _card(3.35, 989, 494, 67, 132),  # H100 SXM
    100: _card(8.0, 2250, 1100, 80, 148),  # B200
    120: _card(1.79, 210, 105, 105, 170),  # RTX 5090
    "gfx942": _card(5.3, 1307, 654, 163, 304),  # MI300X
    "gfx950": _card(8.0, 2500, 157, 157, 256),  # MI355X
}


@dataclass(frozen=True)
class Work:
    """The sizes of one call, `size` bytes an element of x and the weight."""

    M: int
    N: int
    K: int
    R: int
    size: int
    dropout: bool


@dataclass(frozen=True)
class Pass:
    """One kernel: bytes, operations, the tiles of its product (0: it is none), whether Triton launches it, and the
    share of ATen's rate that its instructions reach by the machine code."""

    bytes: float
    flops: float = 0.0
    tiles: int = 0
    triton: bool = False
    rate: float = 1.0

    def seconds(self, machine: Machine, dtype: str) -> float:
        busy = 1.0
        if self.tiles and machine.multiprocessors:
            busy = self.tiles / (-(-self.tiles // machine.multiprocessors) * machine.multiprocessors)
        return max(self.bytes / machine.bytes_per_s, self.flops / machine.flops_per_s[dtype] / busy / self.rate)


Passes = tuple[list[Pass], list[Pass]]  # forward, backward


def seconds(passes: list[Pass], machine: Machine, dtype: str, captured: bool = True, node: bool = False) -> float:
    """Of all these passes: replayed by a graph, or launched one by one by the host, by the node in C++ or by Python."""
    gpu = sum(one.seconds(machine, dtype) for one in passes)
    host = sum((NODE_S if node else PYTHON_S) if one.triton else ATEN_S for one in passes)
    return gpu if captured else max(gpu, host)


def predict(path: str, problem: Problem, captured: bool, node: bool) -> float:
    """Seconds of forward and backward by `path` on the usual card of the device's architecture."""
    from fastlora.kernels.tiles import target_of

    dtype = "tf32" if problem.tf32 else str(problem.dtype).removeprefix("torch.")
    work = Work(problem.M, problem.N, problem.K, problem.R, problem.dtype.itemsize, problem.dropout)
    forward, backward = PATHS[path](work)
    machine = NOMINAL[target_of(problem.device).family]
    return seconds(forward + backward, machine, dtype if dtype in machine.flops_per_s else "float32", captured, node)


def product(work: Work, rows: int, inner: int, columns: int, extra: float = 0.0, tile: int = TILE, **kind) -> Pass:
    """One matrix product (rows, inner) @ (inner, columns), each operand read once, the result written once."""
    moved = work.size * (rows * inner + inner * columns + rows * columns) + extra
    tiles = -(-rows // tile) * -(-columns // tile) if inner > work.R and min(rows, columns) > work.R else 0
    return Pass(moved, 2.0 * rows * inner * columns, tiles, **kind)


def base(work: Work) -> Passes:
    """The frozen layer alone."""
    M, N, K = work.M, work.N, work.K
    return [product(work, M, K, N)], [product(work, M, N, K)]


def aten(work: Work) -> Passes:
    M, N, K, R, e = work.M, work.N, work.K, work.R, work.size
    forward, backward = base(work)
    if work.dropout:
        forward.append(Pass(2 * M * K * e, triton=True))
    forward += [product(work, M, K, R), product(work, M, R, N, extra=M * N * e)]
    backward += [product(work, M, N, R), product(work, N, M, R), product(work, R, M, K)]
    backward.append(product(work, M, R, K, extra=M * K * e))  # one of dX's two products adds to the other
    if work.dropout:
        backward.append(Pass(4 * M * K * e, triton=True))  # x, and dS A in place
    return forward, backward


def _cpu(work: Work) -> Passes:
    M, N, K, R, e = work.M, work.N, work.K, work.R, work.size
    forward, backward = base(work)
    forward.append(Pass(e * (M * K + 2 * M * N), 2.0 * M * R * (K + N)))
    backward.append(Pass(e * (M * N + 3 * M * K), 4.0 * M * R * (K + N)))
    return forward, backward


def _ds_db(work: Work) -> Pass:
    M, N, R = work.M, work.N, work.R
    return Pass(work.size * (M * N + 2 * N * R + 2 * M * R), 4.0 * M * N * R, triton=True)  # from one read of dY


def _hybrid(work: Work) -> Passes:
    M, N, K, R, e = work.M, work.N, work.K, work.R, work.size
    bits = M * K / 8 if work.dropout else 0.0
    up_y = Pass(e * (M * N + R * (N + M)), 2.0 * M * R * N, triton=True)
    up_dx = Pass(e * (M * K + R * (M + K)) + bits, 2.0 * M * R * K, triton=True)
    add_y, add_dx = product(work, M, K, N, extra=M * N * e), product(work, M, N, K, extra=M * K * e)
    return [product(work, M, K, R, triton=True), up_y, add_y], [_ds_db(work), _da(work), up_dx, add_dx]


def _da(work: Work) -> Pass:
    return product(work, work.R, work.M, work.K, extra=work.M * work.K / 8 if work.dropout else 0.0, triton=True)


def split(work: Work) -> Passes:
    M, N, K, R = work.M, work.N, work.K, work.R
    gemm = {"triton": True, "rate": GEMM_RATE if work.size == 2 else FLOAT_RATE}
    forward = [product(work, M, K, R, triton=True), product(work, M, K + R, N, **gemm)]
    return forward, [_ds_db(work), _da(work), product(work, M, N + R, K, **gemm)]


def _onepass(work: Work) -> Passes:
    M, N, K, R, e = work.M, work.N, work.K, work.R, work.size
    both = product(work, M, K, N, extra=e * R * (K + N + M), tile=SMALL_TILE, triton=True, rate=SMALL_RATE)
    again = max(16, R) / SMALL_TILE  # every column tile makes S anew
    return [replace(both, flops=both.flops * (1 + again) + 2.0 * M * R * N)], split(work)[1]


def _cuda(work: Work) -> Passes:
    """Folded: what has the rank streams beside the product, in one launch each way."""
    return tuple(
        [
            Pass(
                sum(one.bytes for one in each), max(one.flops for one in each), max(one.tiles for one in each), True,
                FOLDED_RATE,
            )
        ]
        for each in split(work)
    )  # fmt: skip


def apart(path: str, many: Sequence[Work]) -> list[Pass]:
    """Projections of one x, each by a call of its own: their passes, and autograd's sums of dX."""
    one = many[0]
    sums = [Pass(3.0 * one.M * one.K * one.size)] * (len(many) - 1)
    return [each for work in many for direction in PATHS[path](work) for each in direction] + sums


def together(path: str, many: Sequence[Work]) -> list[Pass]:
    """The same computed together (fastlora/paths/shared.py): what has the rank reads x once each way, dX is summed in
    the products. With dropout `torch` makes and reads a dropped x for each."""
    one, ranks = many[0], sum(work.R for work in many)
    M, K, e = one.M, one.K, one.size
    rows = M * K * e
    if path == "cpu" or (path == "torch" and one.dropout):  # only the sums are gone
        return apart(path, many)[: 1 - len(many)] + [Pass(rows)] * (len(many) - 1)
    triton = path != "torch"
    down = Pass(rows + e * ranks * (M + K), 2.0 * M * K * ranks, triton=triton)  # all S
    # dX: with kernels the updates are there already, to which all products add
    dxs = [product(w, M, w.N, K, extra=rows * (triton or i > 0)) for i, w in enumerate(many)]
    if not triton:
        passes = [down, down, Pass(2.0 * rows + e * ranks * (M + K)), *dxs]  # S, dA, dX
        for w in many:
            passes += [product(w, M, K, w.N), product(w, M, w.R, w.N, extra=M * w.N * e)]
            passes += [product(w, M, w.N, w.R), product(w, w.N, M, w.R)]
        return passes
    da_dx = Pass(2.0 * rows + e * ranks * (M + 2 * K), 4.0 * M * K * ranks, triton=True)
    passes = [down, _joined([_ds_db(w) for w in many]), da_dx]
    if path == "hybrid":
        ups = _joined([product(w, M, w.R, w.N, triton=True) for w in many])
        return [*passes, ups, *(product(w, M, K, w.N, extra=M * w.N * e) for w in many), *dxs]
    ys = [split(w)[0][-1] for w in many]
    dx = _joined(dxs, 2.0 * rows * (len(many) - 1))
    dx = replace(dx, tiles=dxs[0].tiles, triton=True, rate=ys[0].rate)  # one product's, each deeper
    if path == "onepass":  # of small layers, where one launch reads x
        ys = [_joined(ys, (len(many) - 1) * rows)]
    return [*passes, *ys, dx]


def _joined(passes: Sequence[Pass], less: float = 0.0) -> Pass:
    """One launch for all, which moves so many bytes `less`."""
    total = {name: sum(getattr(one, name) for one in passes) for name in ("bytes", "flops", "tiles")}
    return replace(passes[0], **total | {"bytes": total["bytes"] - less})


def moved(passes: Sequence[Pass]) -> float:
    """Bytes of all these."""
    return sum(one.bytes for one in passes)


PATHS: dict[str, Callable[[Work], Passes]] = {
    "torch": aten,
    "cpu": _cpu,
    "hybrid": _hybrid,
    "onepass": _onepass,
    "split": split,
    "cuda": _cuda,
}
