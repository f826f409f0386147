"""mma, ldmatrix, stmatrix and wgmma against the PTX ISA's figures, spelled out element by element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from .memory import Fault
from .micro import kernel, launch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def draw(rows: int, columns: int, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as float64, and the bits of its elements; tf32 with low bits that no product reads."""
    t = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DTYPES[kind])
    if kind != "tf32":
        return t.double().numpy(), t.view(torch.int16).numpy().view(np.uint16)
    bits = t.numpy().view(np.uint32)
    return (bits & 0xFFFFE000).view(np.float32).astype(np.float64), bits | 0x1ABC & 0x1FFF


def place(lane: int, i: int, per: int) -> tuple[int, int]:
    """Row and column of element i of A: `per` elements a register."""
    register, e = divmod(i, per)
    return lane // 4 + 8 * (register % 2), (lane % 4) * per + e + 4 * per * (register // 2)


@pytest.mark.parametrize("k, kind", [(16, "bf16"), (16, "f16"), (8, "bf16"), (8, "f16"), (8, "tf32"), (4, "tf32")])
def test_mma(k, kind):
    per = 1 if kind == "tf32" else 2
    (a, a_bits), (b, b_bits) = draw(16, k, kind, 1), draw(k, 8, kind, 2)
    c = np.random.default_rng(3).standard_normal((16, 8)).astype(np.float32)
    na, nb = 16 * k // 32 // per, 8 * k // 32 // per
    registers = np.zeros((32, na + nb + 4), np.uint32)
    for lane in range(32):
        for i in range(na * per):
            registers[lane, i // per] |= np.uint32(a_bits[place(lane, i, per)]) << np.uint32(16 * (i % per))
        for i in range(nb * per):
            column, row = place(lane, 2 * (i // per) * per + i % per, per)  # as A's rows, one register in two
            registers[lane, na + i // per] |= np.uint32(b_bits[row, column]) << np.uint32(16 * (i % per))
        for i in range(4):
            registers[lane, na + nb + i] = c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2].view(np.uint32)
    out = np.zeros((32, 4), np.uint32)
    count = registers.shape[1]
    loads = "\n".join(f"ld.global.b32 %r{i}, [%d50+{4 * i}];" for i in range(count))
    names = [f"%r{i}" for i in range(count)]
    vectors = [", ".join(names[s]) for s in (slice(na), slice(na, na + nb), slice(na + nb, None))]
    launch(kernel(f"""
        mad.wide.u32 %d50, %r99, {4 * count}, %d0; mad.wide.u32 %d51, %r99, 16, %d1;
        {loads}
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32
            {{%r50, %r51, %r52, %r53}}, {{{vectors[0]}}}, {{{vectors[1]}}}, {{{vectors[2]}}};
        st.global.v4.b32 [%d51], {{%r50, %r51, %r52, %r53}};""", 2), [registers, out])  # fmt: skip
    want = (a @ b + c).astype(np.float32)
    for lane, i in itertools.product(range(32), range(4)):
        assert out[lane, i].view(np.float32) == want[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans):
    """Lane 8 j + r points to row r of matrix j; lane 4 r + t gets elements 2 t and 2 t + 1 of row (or column) r."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    memory, out, back = matrices.copy(), np.zeros((32, count), np.uint32), np.zeros((count, 8, 8), np.uint16)
    names = ", ".join(f"%r{i}" for i in range(count))
    stores = "\n".join(f"st.global.b32 [%d51+{4 * i}], %r{i};" for i in range(count))
    program = kernel(f"""
        mov.u32 %r60, smem; mad.lo.u32 %r61, %r99, 16, %r60; mad.wide.u32 %d50, %r99, 16, %d0;
        setp.lt.u32 %p1, %r99, {8 * count};
        @%p1 ld.global.v4.b32 {{%r70, %r71, %r72, %r73}}, [%d50];
        @%p1 st.shared.v4.b32 [%r61], {{%r70, %r71, %r72, %r73}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r61];
        mad.wide.u32 %d51, %r99, {4 * count}, %d1;
        {stores}
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r61], {{{names}}};
        bar.sync 0;
        mad.wide.u32 %d52, %r99, 16, %d2;
        @%p1 ld.shared.v4.b32 {{%r70, %r71, %r72, %r73}}, [%r61];
        @%p1 st.global.v4.b32 [%d52], {{%r70, %r71, %r72, %r73}};""", 3, shared=512)  # fmt: skip
    launch(program, [memory, out, back])
    for lane, j in itertools.product(range(32), range(count)):
        m = matrices[j].T if trans else matrices[j]
        pair = m[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
        assert out[lane, j] == int(pair[0]) | int(pair[1]) << 16
    assert (back == matrices).all()


def layout(outer: int, inner: int, size: int, swizzle: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """Byte offsets of an operand's elements, its leading and its stride offset, as a kernel's author would lay it out.

    Rows of `16 << swizzle` bytes, eight to an atom, 16-byte chunks xored with the row; atoms one behind the other.
    """
    width = 16 << swizzle
    offsets = np.zeros((outer, inner), np.int64)
    atom, elements = 8 * width, width // size
    across = inner if transposed else outer
    for o, i in itertools.product(range(outer), range(inner)):
        contiguous, row = (o, i) if transposed else (i, o)
        block, within = divmod(contiguous, elements)
        chunk, rest = divmod(within * size, 16)
        chunk ^= row % 8 >> 3 - swizzle if swizzle else 0
        number = block * (across // 8) + row // 8 if transposed or not swizzle else row // 8 + block * (across // 8)
        offsets[o, i] = number * atom + row % 8 * width + chunk * 16 + rest
    return offsets, atom * (across // 8), atom


WGMMA = [
    *((64, "bf16", s, s, t, t) for s in range(4) for t in (False, True)), (8, "bf16", 3, 3, False, False),
    (256, "f16", 3, 3, False, False), (128, "f16", 3, 3, False, True), (64, "bf16", 2, 3, True, False),
    (32, "tf32", 3, 3, False, False), (16, "tf32", 1, 2, False, False), (64, "bf16", None, 3, False, True),
    (24, "tf32", None, 3, False, False),
]  # fmt: skip


@pytest.mark.parametrize("order", [{"late": True}, {"late": False}])
@pytest.mark.parametrize("n, kind, swizzle_a, swizzle_b, trans_a, trans_b", WGMMA)
def test_wgmma(n, kind, swizzle_a, swizzle_b, trans_a, trans_b, order):
    size = 4 if kind == "tf32" else 2
    k, in_registers = 32 // size, swizzle_a is None
    (a, a_bits), (b, b_bits) = draw(64, k, kind, 1), draw(n, k, kind, 2)
    shared = np.zeros(48 * 1024, np.uint8)
    descriptors = []
    for start, bits, swizzle, trans in ((0, a_bits, swizzle_a, trans_a), (16384, b_bits, swizzle_b, trans_b)):
        if swizzle is None:
            continue
        offsets, leading, stride = layout(*bits.shape, size, swizzle, trans)
        if trans and not swizzle:
            leading, stride = stride, leading  # as the PTX ISA names them without swizzling
        for byte in range(size):
            shared[start + offsets + byte] = bits >> 8 * byte & 255
        kind_of = {0: 0, 1: 3, 2: 2, 3: 1}[swizzle]
        descriptors.append((1024 + start >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | kind_of << 62)
    assert not shared[16384 + n * 128 + 16384 :].any()
    registers = np.zeros((128, 4), np.uint32)
    per = 4 // size
    for lane, i in itertools.product(range(128), range(4 * per)):
        row, column = place(lane % 32, i, per)
        registers[lane, i // per] |= np.uint32(a_bits[16 * (lane // 32) + row, column]) << np.uint32(16 * (i % per))
    c = np.random.default_rng(3).standard_normal((64, n)).astype(np.float32)
    lane, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    rows, columns = 16 * (lane // 32) + lane % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
    d = c[rows, columns].copy()
    names = [f"%x{i}" for i in range(n // 2)]
    loads = "\n".join(f"ld.global.b32 {x}, [%d51+{4 * i}];" for i, x in enumerate(names))
    stores = "\n".join(f"st.global.b32 [%d51+{4 * i}], {x};" for i, x in enumerate(names))
    first = "{%r10, %r11, %r12, %r13}" if in_registers else f"{descriptors[0]}"
    flags = [1, 1, 1, *([] if kind == "tf32" else [int(trans_b)] if in_registers else [int(trans_a), int(trans_b)])]
    flags = ", ".join(str(f) for f in flags)
    program = kernel(f"""
        .reg .b32 %x<{n // 2}>;
        mov.u32 %r60, smem; mad.wide.u32 %d50, %r99, 384, %d0; mad.lo.u32 %r61, %r99, 384, %r60;
        mov.u32 %r1, 0;
        L: ld.global.v4.b32 {{%r70, %r71, %r72, %r73}}, [%d50]; st.shared.v4.b32 [%r61], {{%r70, %r71, %r72, %r73}};
        add.s64 %d50, %d50, 16; add.u32 %r61, %r61, 16; add.u32 %r1, %r1, 16; setp.lt.u32 %p1, %r1, 384; @%p1 bra L;
        mad.wide.u32 %d52, %r99, 16, %d1; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d52];
        mad.wide.u32 %d51, %r99, {2 * n}, %d2;
        {loads}
        fence.proxy.async.shared::cta; bar.sync 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}
            {{{", ".join(names)}}}, {first}, {descriptors[-1]}, {flags};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {stores}""", 3, 128, shared.size)  # fmt: skip
    launch(program, [shared, registers, d], **order)
    want = (a @ b.T + c).astype(np.float32)
    assert (d == want[rows, columns]).all()


def test_wgmma_needs_its_whole_warp_group_and_a_proxy_fence():
    body = """
        .reg .b32 %x<4>; mov.u32 %r60, smem; mad.lo.u32 %r61, %r99, 16, %r60;
        st.shared.v4.b32 [%r61], {{%r99, %r99, %r99, %r99}};
        st.shared.v4.b32 [%r61+2048], {{%r99, %r99, %r99, %r99}};
        mov.b32 %x0, 0; mov.b32 %x1, 0; mov.b32 %x2, 0; mov.b32 %x3, 0;
        {} bar.sync 0; setp.lt.u32 %p1, %r99, {}; @!%p1 ret;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%x0, %x1, %x2, %x3}}, {}, {}, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; add.u32 %r1, %x0, %x1;"""
    for fence, lanes, what in (
        ("", 128, "fence.proxy"),
        ("fence.proxy.async;", 96, "warp"),
        ("fence.proxy.async.global;", 128, "proxy"),
    ):
        with pytest.raises(Fault, match=what):
            descriptor = 64 | 16 << 16 | 8 << 32
            launch(kernel(body.format(fence, lanes, descriptor, descriptor), 1, 128, 4096), [np.zeros(4, np.uint8)])
