"""Each arithmetic instruction against plain integers, fractions and torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from .micro import elementwise, kernel, launch
from .parse import Unsupported

EDGES = {16: [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x5555, 0xABCD], 32: [0, 1, 2, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1],
         64: [0, 1, 2, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]}  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, 3.4e38, -3.4e38, 1e-40, -1e-45, 1.17549435e-38, math.inf, -math.inf, math.nan,
          2.0**24 + 1, 0.1, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-9 + 2.0**-23, 65519.0, 65520.0,
          1 + 2.0**-11]  # fmt: skip


def integers(bits: int, count: int, seed: int) -> list[np.ndarray]:
    """All pairs of edges, then chance; `count` arrays."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.array(EDGES[bits], np.uint64)] * 2), -1).reshape(-1, 2).T
    drawn = rng.integers(0, 2**bits, (count, 160), dtype=np.uint64, endpoint=False)
    drawn[:2, : grid.shape[1]] = grid[:count]
    return [row.astype(f"u{bits // 8}") for row in drawn]


def signed(v: int, bits: int) -> int:
    return v - (1 << bits) if v >> bits - 1 else v


def value(v, kind: str) -> int:
    return signed(int(v), int(kind[1:])) if kind[0] == "s" else int(v)


def divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bit_field(a: int, position: int, length: int, is_signed: bool) -> int:
    position, length = position & 255, length & 255
    top = (a >> min(position + length - 1, 31)) & 1 if is_signed and length else 0
    return sum(((a >> position + i & 1) if position + i < 32 else top) << i for i in range(min(length, 32))) | (
        -1 << min(length, 32) if top else 0
    )


def insert(a: int, b: int, position: int, length: int) -> int:
    for i in range(min(length & 255, 32)):
        if (position & 255) + i < 32:
            at = (position & 255) + i
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def permute(a: int, b: int, selector: int) -> int:
    both = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def clamp(n: int, most: int) -> int:
    return min(n, most)


INTEGER = [
    *((f"{op}.{k}", k, [k, k], f) for k in ("u32", "s32", "u64", "s64", "u16", "s16") for op, f in (
        ("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("min", min), ("max", max),
        ("mul.lo", lambda a, b: a * b))),
    *((f"mul.hi.{k}", k, [k, k], lambda a, b, k=k: a * b >> int(k[1:])) for k in ("u32", "s32", "u64", "s64")),
    *((f"mul.wide.{k}", f"{k[0]}{2 * int(k[1:])}", [k, k], lambda a, b: a * b) for k in ("u32", "s32", "u16", "s16")),
    ("mad.lo.s32", "s32", ["s32"] * 3, lambda a, b, c: a * b + c),
    ("mad.wide.u32", "u64", ["u32", "u32", "u64"], lambda a, b, c: a * b + c),
    ("mad.wide.s32", "s64", ["s32", "s32", "s64"], lambda a, b, c: a * b + c),
    ("mad.hi.u32", "u32", ["u32"] * 3, lambda a, b, c: (a * b >> 32) + c),
    *((f"div.{k}", k, [k, k], lambda a, b: divide(a, b) if b else -1) for k in ("u32", "s32", "u64")),
    *((f"rem.{k}", k, [k, k], lambda a, b: a - divide(a, b) * b if b else a) for k in ("u32", "s32", "u64")),
    *((f"{op}.b{w}", f"b{w}", [f"b{w}"] * 2, f) for w in (16, 32, 64) for op, f in (
        ("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b))),
    *((f"not.b{w}", f"b{w}", [f"b{w}"], lambda a: ~a) for w in (16, 32, 64)),
    *((f"{op}.s{w}", f"s{w}", [f"s{w}"], f) for w in (16, 32, 64) for op, f in (("neg", lambda a: -a), ("abs", abs))),
    *((f"shl.b{w}", f"b{w}", [f"b{w}", "u32"], lambda a, n, w=w: a << n if n < w else 0) for w in (16, 32, 64)),
    *((f"shr.{s}{w}", f"{s}{w}", [f"{s}{w}", "u32"], lambda a, n: a >> clamp(n, 64)) for w in (16, 32, 64)
      for s in "us"),
    ("shf.l.wrap.b32", "b32", ["b32"] * 3, lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    ("shf.r.wrap.b32", "b32", ["b32"] * 3, lambda a, b, n: (b << 32 | a) >> (n & 31)),
    ("shf.l.clamp.b32", "b32", ["b32"] * 3, lambda a, b, n: (b << 32 | a) << clamp(n, 32) >> 32),
    ("shf.r.clamp.b32", "b32", ["b32"] * 3, lambda a, b, n: (b << 32 | a) >> clamp(n, 32)),
    ("bfe.u32", "u32", ["u32"] * 3, lambda a, p, n: bit_field(a, p, n, False)),
    ("bfe.s32", "s32", ["s32", "u32", "u32"], lambda a, p, n: bit_field(a & 2**32 - 1, p, n, True)),
    ("bfi.b32", "b32", ["b32"] * 4, insert),
    ("prmt.b32", "b32", ["b32"] * 3, lambda a, b, c: permute(a, b, c & 0xFFFF)),
    *((f"popc.b{w}", "u32", [f"b{w}"], lambda a: bin(a).count("1")) for w in (32, 64)),
    *((f"clz.b{w}", "u32", [f"b{w}"], lambda a, w=w: w - a.bit_length()) for w in (32, 64)),
    ("brev.b32", "b32", ["b32"], lambda a: int(f"{a:032b}"[::-1], 2)),
    *((f"cvt.{to}.{k}", to, [k], lambda a: a) for to, k in (
        ("s64", "s32"), ("u64", "u32"), ("u32", "u64"), ("s32", "s16"), ("u16", "u32"))),
]  # fmt: skip


@pytest.mark.parametrize("case", INTEGER, ids=lambda c: c[0])
def test_integers(case):
    instruction, out, kinds, function = case
    operands = [
        integers(int(k[1:]), 4, i)[min(i, 1)] if i < 2 else integers(int(k[1:]), 4, i)[2] for i, k in enumerate(kinds)
    ]
    if instruction.startswith(("shl", "shr", "shf", "bfe", "bfi")):  # shifts and lengths around the width, too
        small = np.random.default_rng(9).integers(0, 70, 160).astype(np.uint32)
        operands[-1][20:] = small[20:]
        if instruction[:2] == "bf":
            operands[-2][20:] = small[::-1][20:]
    got = elementwise(instruction, out, kinds, operands)
    want = [
        function(*(value(v, k) for v, k in zip(row, kinds, strict=True))) & (1 << int(out[1:])) - 1
        for row in zip(*operands, strict=True)
    ]
    assert [int(v) for v in got] == want


@pytest.mark.parametrize("table", [0x96, 0xE8, 0x1B, 0xCA, 0x80, 0x01])
def test_lop3(table):
    a, b, c, _ = integers(32, 4, 3)
    got = elementwise("lop3.b32", "b32", ["b32"] * 3, (a, b, c), f", {table}")
    for x, y, z, g in zip(*(v.tolist() for v in (a, b, c, got)), strict=True):
        assert g == sum((table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32))


def floats(count: int, dtype=np.float32) -> list[np.ndarray]:
    """All pairs of edges, then chance."""
    rng = np.random.default_rng(5)
    grid = np.array(np.meshgrid(FLOATS, FLOATS)).reshape(2, -1)
    drawn = [rng.standard_normal(480) * 2.0 ** rng.integers(-20, 20, 480) for _ in range(count)]
    for row, edge in zip(drawn, grid, strict=False):
        row[: edge.size] = edge
    with np.errstate(over="ignore"):
        return [row.astype(dtype) for row in drawn]


def same(got: np.ndarray, want: torch.Tensor | np.ndarray) -> None:
    want = want.numpy() if isinstance(want, torch.Tensor) else want
    got = got.view(want.dtype)
    both_nan = np.isnan(got) & np.isnan(want)
    bits = f"u{want.dtype.itemsize}"
    wrong = (got.view(bits) != want.view(bits)) & ~both_nan
    assert not wrong.any(), (got[wrong][:5], want[wrong][:5])


def nearest(exact: Fraction) -> float:
    """float32 to nearest even, of any fraction."""
    if not exact:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact))) - 23, -149)
    while abs(exact) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while exponent > -149 and abs(exact) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    result = Fraction(round(exact / Fraction(2) ** exponent)) * Fraction(2) ** exponent
    return math.copysign(math.inf, exact) if abs(result) >= 2**128 else float(result)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "min", "max", "min.NaN", "max.NaN"])
def test_float32(op):
    a, b = floats(2)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    want = {"add": x + y, "sub": x - y, "mul": x * y, "div": x / y, "min": torch.fmin(x, y), "max": torch.fmax(x, y),
            "min.NaN": torch.minimum(x, y), "max.NaN": torch.maximum(x, y)}[op].numpy()  # fmt: skip
    keep = slice(None)
    if op[:3] in ("min", "max"):
        keep = (a != b) | (a == 0) & (np.signbit(a) == np.signbit(b))  # of equal zeros torch keeps either
    same(elementwise(f"{op}.full.f32" if op == "div" else f"{op}.f32", "f32", ["f32"] * 2, (a, b))[keep], want[keep])


def test_fma_rounds_once():
    a, b, c = (v.copy() for v in floats(3))
    a[:4], b[:4] = 1 + 2.0**-12, 1 + 2.0**-12  # 1 + 2^-11 + 2^-24: a tie of float32, until c is added
    c[:4] = [2.0**-80, -(2.0**-80), 0, 2.0**-30]
    a[4:8], b[4:8], c[4:8] = 2.0**-75, 2.0**-75, 2.0**-149 * np.array([1, 2, 3, 0])
    got = elementwise("fma.rn.f32", "f32", ["f32"] * 3, (a, b, c)).view(np.float32)
    for x, y, z, g in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        if all(map(math.isfinite, (x, y, z))):
            want = nearest(Fraction(x) * Fraction(y) + Fraction(z))
            assert g == want, (x, y, z)
    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    with np.errstate(all="ignore"):
        same(got[special], (a.astype(float) * b + c).astype(np.float32)[special])


@pytest.mark.parametrize("op", ["add.ftz", "mul.ftz", "fma.rn.ftz"])
def test_flush_to_zero(op):
    a, b, c = floats(3)
    operands = (a, b, c)[: 3 if "fma" in op else 2]
    x = [np.where(np.abs(v) < 2.0**-126, np.copysign(np.float32(0), v), v).astype(float) for v in operands]
    with np.errstate(all="ignore"):
        want = (x[0] + x[1] if "add" in op else x[0] * x[1] if "mul" in op else x[0] * x[1] + x[2]).astype(np.float32)
    want = np.where(np.abs(want) < 2.0**-126, np.copysign(np.float32(0), want), want)
    same(elementwise(f"{op}.f32", "f32", ["f32"] * len(operands), operands), want)


@pytest.mark.parametrize("kind, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma.rn", "neg", "abs", "min", "max"])
def test_halves_one_and_two(op, kind, dtype):
    a, b, c = (torch.from_numpy(v).to(dtype) for v in floats(3))
    count = {"fma.rn": 3, "neg": 1, "abs": 1}.get(op, 2)
    x = [v.double() for v in (a, b, c)]
    exact = {"add": x[0] + x[1], "sub": x[0] - x[1], "mul": x[0] * x[1], "fma.rn": x[0] * x[1] + x[2], "neg": -x[0],
             "abs": x[0].abs(), "min": torch.fmin(*x[:2]), "max": torch.fmax(*x[:2])}[op]  # fmt: skip
    want = exact.to(torch.float16) if kind == "f16" else torch.from_numpy(bf16(exact.numpy()).view(np.int16))
    bits = [v.view(torch.int16).numpy().view(np.uint16) for v in (a, b, c)][:count]
    if op in ("min", "max"):
        keep = np.flatnonzero((x[0] != x[1]).numpy())
        keep, want, bits = (
            keep[: keep.size // 2 * 2],
            want[torch.from_numpy(keep[: keep.size // 2 * 2])],
            [b[keep[: keep.size // 2 * 2]] for b in bits],
        )
    one = elementwise(f"{op}.{kind}", kind, [kind] * count, bits)
    two = elementwise(f"{op}.{kind}x2", f"{kind}x2", [f"{kind}x2"] * count, [b.view(np.uint32) for b in bits])
    assert (one == two.view(np.uint16)).all()
    wanted = want.view(torch.int16).numpy().view(np.uint16)
    nan = torch.isnan(exact if op not in ("min", "max") else exact[torch.from_numpy(keep)]).numpy()
    assert ((one == wanted) | nan).all()


def bf16(x: np.ndarray) -> np.ndarray:
    """float64 to bfloat16 by fractions: torch rounds twice."""
    out = np.zeros(x.size, np.uint16)
    for i, v in enumerate(x.tolist()):
        if math.isfinite(v) and v:
            exponent = max(math.frexp(v)[1] - 8, -133)
            result = math.ldexp(round(Fraction(v) / Fraction(2) ** exponent), exponent)
            out[i] = np.float64(result).astype(np.float32).view(np.uint32) >> 16
        else:
            out[i] = np.array(v, np.float32).view(np.uint32) >> 16
    return out


CONVERSIONS = [
    ("cvt.rn.bf16.f32", "bf16", "f32"), ("cvt.rn.f16.f32", "f16", "f32"), ("cvt.f32.f16", "f32", "f16"),
    ("cvt.f32.bf16", "f32", "bf16"), ("cvt.rn.f32.f64", "f32", "f64"), ("cvt.f64.f32", "f64", "f32"),
]  # fmt: skip
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


@pytest.mark.parametrize("instruction, to, kind", CONVERSIONS)
def test_conversions(instruction, to, kind):
    (a,) = floats(1, np.float64)
    x = torch.from_numpy(a).to(TORCH[kind])
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}
    got = elementwise(instruction, to, [kind], [x.view(torch.uint8).numpy().view(bits[x.itemsize])])
    want = x.to(TORCH[to])
    wrong = (got != want.view(torch.uint8).numpy().view(got.dtype)) & ~want.isnan().numpy()
    assert not wrong.any()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_two_halves_at_once(kind):
    a, b = floats(2)
    got = elementwise(f"cvt.rn.{kind}x2.f32", f"{kind}x2", ["f32"] * 2, (a, b)).view(np.uint16).reshape(-1, 2)
    for column, x in ((0, b), (1, a)):  # the first operand goes into the upper half
        want = torch.from_numpy(x).to(TORCH[kind])
        assert ((got[:, column] == want.view(torch.int16).numpy().view(np.uint16)) | want.isnan().numpy()).all()


def test_tf32_rounds_ties_away():
    a = np.array([1 + k * 2.0**-12 for k in range(8)] + [-1 - 2.0**-11, 3e38, math.inf], np.float32)
    got = elementwise("cvt.rna.tf32.f32", "tf32", ["f32"], (a,)).view(np.float32)
    unit = 2.0 ** (np.floor(np.log2(np.abs(a[:-1].astype(float)))) - 10)
    scaled = np.abs(a[:-1].astype(float)) / unit
    assert (got[:-1] == np.sign(a[:-1]) * np.floor(scaled + 0.5) * unit).all() and got[-1] == math.inf


@pytest.mark.parametrize(
    "mode, function", [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)]
)
def test_float_to_integer(mode, function):
    a = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, 2.0**31, 3.7, -3.7, math.inf, -math.inf, math.nan], np.float32
    )
    for to, low, high in (("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1), ("s64", -(2**63), 2**63 - 1)):
        got = elementwise(f"cvt.{mode}.{to}.f32", to, ["f32"], (a,))
        for x, g in zip(a.tolist(), got.tolist(), strict=True):
            want = 0 if math.isnan(x) else low if x == -math.inf else high if x == math.inf else function(x)
            assert g == min(max(want, low), high) & (1 << int(to[1:])) - 1, (x, to)
    got = elementwise(f"cvt.{mode}.f32.f32", "f32", ["f32"], (a,)).view(np.float32)
    assert got[:10].tolist() == [float(function(x)) for x in a[:10].tolist()]


def test_integer_to_float():
    a = integers(32, 1, 0)[0]
    same(
        elementwise("cvt.rn.f32.u32", "f32", ["u32"], (a,)),
        np.array([nearest(Fraction(int(v))) for v in a], np.float32),
    )
    want = np.array([nearest(Fraction(signed(int(v), 32))) for v in a], np.float32)
    same(elementwise("cvt.rn.f32.s32", "f32", ["s32"], (a,)), want)


@pytest.mark.parametrize("op, function", [
    ("ex2", torch.exp2), ("lg2", torch.log2), ("rcp", torch.reciprocal), ("sqrt", torch.sqrt), ("rsqrt", torch.rsqrt),
])  # fmt: skip
def test_approximations(op, function):
    a = np.abs(floats(1)[0])
    got = elementwise(f"{op}.approx.f32", "f32", ["f32"], (a,)).view(np.float32)
    want = function(torch.from_numpy(a).double()).float().numpy()
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-7 if op == "lg2" else 0)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "f32"])
def test_comparisons(kind):
    a, b = floats(2) if kind[0] == "f" else integers(int(kind[1:]), 2, 1)
    x, y = (
        (a, b)
        if kind != "s32" and kind != "s64"
        else (a.view(f"i{kind[1:] and int(kind[1:]) // 8}"), b.view(f"i{int(kind[1:]) // 8}"))
    )
    nan = np.isnan(x) | np.isnan(y) if kind[0] == "f" else np.zeros(x.size, bool)
    table = {"eq": x == y, "ne": (x != y) & ~nan, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    if kind[0] == "f":
        table |= {f"{k}u": v | nan for k, v in table.items()} | {"num": ~nan, "nan": nan}
    letter, size = ("d", 8) if kind == "s64" else ("r", 4)
    for name, want in table.items():
        body = f"""
            mad.wide.u32 %d80, %r99, {size}, %d0; ld.global.b{8 * size} %{letter}10, [%d80];
            mad.wide.u32 %d81, %r99, {size}, %d1; ld.global.b{8 * size} %{letter}11, [%d81];
            setp.{name}.{kind} %p1|%p2, %{letter}10, %{letter}11;
            setp.{name}.and.{kind} %p3, %{letter}10, %{letter}11, %p2;
            selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; selp.b32 %r3, 4, 0, %p3;
            or.b32 %r1, %r1, %r2; or.b32 %r1, %r1, %r3;
            mad.wide.u32 %d82, %r99, 4, %d2; st.global.b32 [%d82], %r1;"""
        n = -(-a.size // 32) * 32
        arrays = [np.resize(a, n), np.resize(b, n), np.zeros(n, np.uint32)]
        launch(kernel(body, 3, n), arrays)
        assert (arrays[2][: a.size] == np.where(want, 1, 2)).all(), name


@pytest.mark.parametrize("instruction", [
    "add.sat.f32 %r1, %r2, %r3;", "add.rz.f32 %r1, %r2, %r3;", "mul.rm.f32 %r1, %r2, %r3;",
    "fma.rn.relu.bf16 %h1, %h2, %h3, %h4;", "cvt.rz.f32.f64 %r1, %d2;", "cvt.rn.sat.f16.f32 %h1, %r2;",
    "cvt.rn.relu.bf16.f32 %h1, %r2;", "cvt.rn.f16.f64 %h1, %d2;",
    "prmt.b32.f4e %r1, %r2, %r3, %r4;", "ex2.approx.f16 %h1, %h2;", "min.xorsign.abs.f32 %r1, %r2, %r3;",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4};", "shfl.bfly.b32 %r1, %r2, 1, 31;",
    "ld.global.acquire.u32 %r1, [%d0];", "atom.global.add.noftz.f16 %h1, [%d0], %h2;", "mul24.lo.u32 %r1, %r2, %r3;",
    "fence.proxy.alias;", "cp.async.bulk.prefetch.L2.global [%d0], 16;", "bar.red.popc.u32 %r1, 0, %p1;",
    "multimem.red.add.f32 [%d0], %r1;", "tcgen05.fence::after_thread_sync;",
])  # fmt: skip
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(Unsupported):
        kernel(instruction, 1)
