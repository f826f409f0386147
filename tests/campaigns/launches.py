"""Whether the node hands to the driver what Triton's own launcher hands over, byte for byte. No GPU is needed.

    python -m tests.campaigns.launches [--quick]     # with a CUDA build of torch and the node built for it; minutes

On the hollow GPU (sync.py) each call runs twice: by its path in Python, where Triton launches, then by the node, from
the record that the first has left. The stand-in tells what the driver was given: function, grid, block, shared memory,
stream, attributes, every byte of every parameter, tensor maps included, and the products that cuBLAS was asked for, in
order. Both must be the same but for the addresses of memory that each takes for itself; those must correspond one to
one. HOLLOW_CAPABILITY=80, 90 (the default), 100, ... is the kind of GPU, HOLLOW_DRIVER the driver's version.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path as File
from unittest import mock

import torch
import triton

import fastlora
from fastlora import choice, node, ops, record
from fastlora.kernels.tiles import WARP_SPECIALISED
from fastlora.paths import Path

from . import sync

PATHS = [choice.PATHS[name] for name in ("torch", "hybrid", "onepass", "split")]
SPECIALISED = choice.PATHS["split"].with_tiles({"gemm": WARP_SPECIALISED, "gemm_dx": WARP_SPECIALISED})
SIZES = ((64, 96, 128), (33, 53, 41), (4096, 512, 1024), (1, 24, 40))  # M, N, K
DTYPES = sync.DTYPES
NEEDS = ((True, True, True), (False, True, True), (True, True, False), (True, False, True))  # gradients of x, A, B
ATTRIBUTE = 72  # bytes of a CUlaunchAttribute


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


OF_LAUNCHES = ctypes.CFUNCTYPE(None, ctypes.POINTER(LaunchConfig), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
OF_PRODUCTS = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, *[ctypes.c_int] * 5, *[ctypes.c_void_p, ctypes.c_int] * 2, ctypes.c_float, ctypes.c_void_p,
    ctypes.c_int,
)  # fmt: skip


class Trace:
    """What the driver and cuBLAS are handed: in `rows`, each (what must be the same, addresses)."""

    def __init__(self, library: str = sync.LIBRARY) -> None:
        self.rows: list[tuple[tuple, tuple[int, ...]]] = []
        self._callbacks = OF_LAUNCHES(self._launch), OF_PRODUCTS(self._product)
        ctypes.CDLL(library).hollow_trace(*self._callbacks)

    def take(self) -> list:
        rows, self.rows = self.rows, []
        return rows

    def _launch(self, config, function, parameters) -> None:
        c = config.contents
        attributes = ctypes.string_at(c.attributes, ATTRIBUTE * c.count) if c.count else b""
        numbers, addresses = [], []
        for i, (size, kind) in enumerate(_parameters().get(function, ())):
            value = ctypes.string_at(parameters[i], size)
            here = 0 if kind == "number" else 8  # an address, alone or before the rest of a tensor map
            if kind == "map" and not _mends_small_maps():
                value = value[:10] + bytes([value[10] & ~0x20]) + value[11:]
            addresses += [int.from_bytes(value[:here], "little")] * bool(here)
            numbers.append(value[here:])
        self.rows.append((("launch", function, *c.sizes, c.stream, attributes, *numbers), tuple(addresses)))

    def _product(self, name, ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc) -> None:
        self.rows.append((("product", name, ta, tb, m, n, k, lda, ldb, beta, ldc), (a, b, c)))


@functools.cache
def _mends_small_maps() -> bool:
    """Whether this Triton does what the node does for tensors below 128 KiB: 3.6 does not know that driver's fault."""
    source = File(triton.__file__).parent / "backends" / "nvidia" / "driver.c"
    return "13010" in source.read_text()


def _parameters() -> dict[int, list[tuple[int, str]]]:
    """Of each kernel recorded so far, by its CUfunction: bytes and kind of each parameter."""
    for kernel in record.kernels - {kernel for kernel, _ in _known.values()}:
        kinds = []
        for kind in kernel.src.signature.values():
            if kind.startswith("tensordesc"):
                kinds += ["map"] + ["number"] * 2 * (kind.split("[")[1].split("]")[0].count(",") + 1)
            elif kind != "constexpr":
                kinds.append("address" if kind.startswith("*") else "number")
        kinds += ["number"] * 2  # memory of Triton's own: none
        _known[kernel.function] = kernel, list(zip(record.sizes_in_ptx(kernel), kinds, strict=True))
    return {function: found for function, (_, found) in _known.items()}


_known: dict[int, tuple[object, list[tuple[int, str]]]] = {}


def differences(first: list, second: list, fixed: dict[int, int]) -> tuple[list[str], dict[int, int]]:
    """(what differs between two traces, which address of the first stands for which of the second).

    `fixed` are pairs known beforehand. No address may stand for two, nor two for one.
    """
    pairs, found = dict(fixed), []
    if len(first) != len(second):
        found.append(f"{len(first)} launches and products in Python, {len(second)} in the node")
    for i, ((same, old), (other, new)) in enumerate(zip(first, second, strict=False)):
        if same != other or len(old) != len(new):
            found.append(f"number {i}: {same} in Python, {other} in the node")
        for a, b in zip(old, new, strict=False):
            if pairs.setdefault(a, b) != b:
                found.append(f"number {i}: address {a:x} is {pairs[a]:x} and {b:x}")
    if len(set(pairs.values())) < len(pairs):
        found.append("two tensors of Python's are one of the node's")
    return found, pairs


class Twice:
    """A call run by Python, recorded, and by the node; `wrong` says what differed."""

    def __init__(self, trace: Trace, path: Path, layout, sizes, R, dtypes, dropout_p, needs, with_bias) -> None:
        (M, N, K), (dtype, adapter_dtype) = sizes, dtypes
        self.trace, self.path, self.dropout_p = trace, path, dropout_p
        self.x = sync.laid_out(layout, M, K, dtype).requires_grad_(needs[0])
        self.weight = torch.zeros(N, K, dtype=dtype, device="cuda")
        self.bias = torch.zeros(N, dtype=dtype, device="cuda") if with_bias else None
        self.lora_A = torch.zeros(R, K, dtype=adapter_dtype, device="cuda", requires_grad=needs[1])
        self.lora_B = torch.zeros(N, R, dtype=adapter_dtype, device="cuda", requires_grad=needs[2])
        self.inputs = (self.x, self.weight, self.lora_A, self.lora_B, self.bias)
        self.wanted = [t for t, need in zip((self.x, self.lora_A, self.lora_B), needs, strict=True) if need]

    def once(self, spoil: Callable[[tuple], tuple] = lambda made: made) -> tuple:
        """(launches of forward, launches of backward, y, gradients, inputs of the records, obstacles, dy)"""
        seen, obstacles = [], []

        def observe(call, inputs, wanted):
            found = record.observe(call, inputs, wanted)
            seen.append(inputs)
            obstacles.append(found[2])
            return found[0], spoil(found[1]), found[2]

        chosen = mock.patch.object(choice, "choose", lambda problem: choice.Choice(self.path, ""))
        with mock.patch.object(node, "observe", observe), chosen:
            y = fastlora.lora_linear(*self.inputs, 2.0, self.dropout_p)
            forward = self.trace.take()
            dy = torch.zeros_like(y)
            self.trace.take()  # the zeros
            gradients = torch.autograd.grad(y, self.wanted, dy, retain_graph=True)
        return forward, self.trace.take(), y, gradients, seen, [o for o in obstacles if o], dy

    def wrong(self, spoil: Callable[[tuple], tuple] = lambda made: made) -> list[str]:
        """What differs; `spoil` changes the records that the node is given."""
        choice.forget()
        self.once()  # compiles the kernels, so that their parameters are known
        choice.forget()
        forward, backward, y, gradients, seen, obstacles, dy = self.once(spoil)
        again, backward_again, y2, gradients2, seen2, _, dy2 = self.once()
        if obstacles or len(seen) != 2 or seen2 or not forward or not backward:
            return [f"not recorded: {obstacles}, {len(seen)} records, then {len(seen2)}"]
        same = {t.data_ptr(): t.data_ptr() for t in self.inputs if t is not None}
        found, pairs = differences(forward, again, same | {y.data_ptr(): y2.data_ptr()})
        kept = {t.data_ptr(): pairs.get(t.data_ptr()) for t in seen[1][5:] if t is not None}  # S and the seed
        results = {a.data_ptr(): b.data_ptr() for a, b in zip(gradients, gradients2, strict=True)}
        if None in kept.values():
            found.append("S or the seed is not what forward wrote")
        return found + differences(backward, backward_again, same | {dy.data_ptr(): dy2.data_ptr()} | kept | results)[0]


def planted(trace: Trace) -> Iterator[str]:
    """Faults in records that the comparison does not find."""

    def of_launch(change: Callable[..., tuple]) -> Callable[[tuple], tuple]:
        def spoil(made: tuple) -> tuple:
            last = max(i for i, step in enumerate(made[2]) if isinstance(step, tuple))
            return *made[:2], (*made[2][:last], change(*made[2][last]), *made[2][last + 1 :])

        return spoil

    def number(function, grid, threads, shared, attributes, parameters, places, pointers, maps):
        fixed = {
            at for row, size in ((pointers, 24), (maps, 184)) for (at,) in struct.iter_unpack(f"q{size - 8}x", row)
        }
        place = next(at for (at,) in struct.iter_unpack("q", places) if at not in fixed)
        parameters = parameters[:place] + bytes([parameters[place] ^ 1]) + parameters[place + 1 :]
        return function, grid, threads, shared, attributes, parameters, places, pointers, maps

    faults = {
        "a wider grid": of_launch(lambda f, grid, *rest: (f, (grid[0] + 1, *grid[1:]), *rest)),
        "more threads": of_launch(lambda f, grid, threads, *rest: (f, grid, threads + 32, *rest)),
        "less shared memory": of_launch(lambda f, g, t, shared, *rest: (f, g, t, max(shared - 16, 0) or 16, *rest)),
        "an attribute": of_launch(lambda f, g, t, s, a, *rest: (f, g, t, s, a + record._attribute(2, 1), *rest)),
        "a number": of_launch(number),
        "a pointer": of_launch(lambda *s: (*s[:7], s[7][:16] + struct.pack("q", 4) + s[7][24:], s[8])),
        "a tensor map": of_launch(lambda *s: (*s[:8], s[8][:-40] + struct.pack("q", 8) + s[8][-32:])),
        "a launch left out": lambda made: (*made[:2], made[2][:-1]),
        "a launch too many": lambda made: (*made[:2], (*made[2], made[2][-1])),
    }
    twice = Twice(trace, SPECIALISED, "plain", SIZES[0], 8, DTYPES[2], 0.1, NEEDS[0], True)
    for what, spoil in faults.items():
        if not twice.wrong(spoil):
            yield f"a planted fault was not found: {what}"


def cases(quick: bool) -> Iterator[tuple]:
    """(layout, (M, N, K), R, (dtype, adapter_dtype), dropout_p, needs, bias)"""
    product = itertools.product
    if quick:
        every = [("plain", SIZES[0], 8, DTYPES[3], 0.1), ("unaligned", SIZES[1], 8, DTYPES[1], 0.0)]
    else:
        every = [
            *product(("plain",), SIZES, (8,), DTYPES, (0.0, 0.1)),
            *product(("plain",), SIZES[:1], (1, 33, 128), DTYPES[2:4], (0.0, 0.1)),
            *product(sync.LAYOUTS[1:], SIZES[:2], (8,), DTYPES[3:4], (0.0, 0.1)),
        ]
    for i, case in enumerate(every):
        yield *case, NEEDS[i // 2 % len(NEEDS)], i % 3 != 2


def specialised_cases(quick: bool) -> Iterator[tuple]:
    """As `cases`, of what the warp-specialised GEMM takes."""
    every = itertools.product(SIZES[::2], (8, 128), sync.DTYPES[1:3], (0.1, 0.0), NEEDS)
    for i, (sizes, R, dtypes, dropout_p, needs) in enumerate(every):
        if not quick or i in (0, 1):
            yield "plain", sizes, R, dtypes, dropout_p, needs, i % 3 != 2


def regimes() -> Iterator[str]:
    """What is wrong of calls that are not the plain one: each must be the node's, or else Python's, as it says here."""
    gpu, of_node, of_python = ctypes.CDLL(sync.LIBRARY), "CppFunction", "_LoRALinearsBackward"
    x, weight, bias, dy = (
        sync.laid_out("plain", *shape, torch.bfloat16) for shape in ((64, 128), (96, 128), (1, 96), (64, 96))
    )
    weight, bias = weight.detach(), bias.detach()[0]
    A, B = (
        torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in ((8, 128), (96, 8))
    )

    def step(**options):
        y = fastlora.lora_linear(x, weight, A, B, bias, 2.0, 0.1, **options)
        torch.autograd.grad(y, (x, A, B), dy)
        names.append(type(y.grad_fn).__name__)

    def captured(**options):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(**options)
        before = gpu.hollow_launches()
        graph.replay()
        if gpu.hollow_launches() == before:
            names.append("an empty graph")

    def within(context, call=step):
        with context:
            call()

    def deterministic():
        torch.use_deterministic_algorithms(True, warn_only=True)
        step()
        step()
        torch.use_deterministic_algorithms(False)

    def in_a_thread():
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    def compiled():
        function = torch.compile(lambda x: fastlora.lora_linear(x, weight, A, B, bias, 2.0, 0.1), backend="aot_eager")
        for served in ((ops._forward, ops._backward), (None, None)):  # without a plan Python would be called, and fail
            node.NODE.serve(*served)
            torch.autograd.grad(function(x), (x, A, B), dy)
        node.NODE.serve(ops._forward, ops._backward)

    choice.forget()
    with mock.patch.object(choice, "choose", lambda problem: choice.Choice(choice.PATHS["hybrid"], "")):
        for what, call, expected in (
            ("the first call", step, [of_python]),
            ("the second call", step, [of_node]),
            ("a side stream", lambda: within(torch.cuda.stream(torch.cuda.Stream())), [of_node]),
            ("a capture", captured, [of_node]),
            ("a capture by a named path", lambda: captured(path="hybrid"), [of_node]),
            ("deterministic algorithms", deterministic, [of_python, of_node]),
            ("autocast", lambda: within(torch.autocast("cuda", dtype=torch.bfloat16)), [of_node]),
            ("another thread", in_a_thread, [of_node]),
            ("a compiled call", compiled, []),
            ("what was chosen is forgotten", lambda: (choice.forget(), step()), [of_python]),
        ):
            names: list[str] = []
            call()
            if names != expected:
                yield f"{what}: {names}, not {expected}"


def compared(quick: bool) -> int:
    """All cases; how many of them differ."""
    if node.NODE is None:
        print(f"no node was compiled for torch {torch.__version__}: python setup.py build_ext --inplace")
        return 1
    trace, calls, wrong = Trace(), 0, 0
    specialised = ((SPECIALISED, case) for case in specialised_cases(quick))
    for path, case in itertools.chain(itertools.product(PATHS, cases(quick)), specialised):
        if path.name == "torch" and len(set(case[3])) > 1:
            continue  # Python lays a cast where a temporary was before: no addresses correspond one to one
        found = Twice(trace, path, *case).wrong()
        calls, wrong = calls + 1, wrong + bool(found)
        print(*(f"{path.label} {case}: {what}" for what in found), sep="\n", end="\n" * bool(found), flush=True)
    print(f"{calls} calls, {len(_known)} kernels: {wrong} calls of the node's differ from Triton's")
    odd = [*planted(trace), *regimes()]
    print(*odd, f"{len(odd)} planted faults not found, or regimes in which another serves than should", sep="\n")
    return wrong + len(odd)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    reason = sync.missing()
    if reason:
        print(f"no hollow GPU here: {reason}")
        return sync.CANNOT_RUN
    if argv[:1] == ["compared"]:
        with sync.trusted():
            return bool(compared("--quick" in argv))
    with tempfile.TemporaryDirectory() as folder:
        return sync.run(
            [sys.executable, "-W", "ignore", "-m", "tests.campaigns.launches", "compared", *argv], File(folder)
        )


if __name__ == "__main__":
    sys.exit(main())
