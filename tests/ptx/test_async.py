"""What goes on by itself, cp.async, TMA, mbarriers, bulk stores: right, late, early, and with a wait too few."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from .hopper import TensorMap
from .launch import tensor_map
from .memory import Fault
from .micro import kernel, launch

ORDERS = [{"late": True}, {"late": False}, {"seed": 0}, {"seed": 1}]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [4, 8, 16])
def test_cp_async_groups(width, order):
    """Four copies in four groups; `cp.async.wait_group n` leaves n under way, and only what has come may be read."""
    x, y = np.arange(4 * 32 * width, dtype=np.uint8), np.zeros(4 * 32 * width, np.uint8)
    row, registers = 32 * width, ["%r70", "%r71", "%r72", "%r73"][: width // 4]
    vector = f"v{width // 4}.b32" if width > 4 else "b32"
    names = f"{{{', '.join(registers)}}}" if width > 4 else registers[0]
    start = f"""mov.u32 %r60, smem; mad.lo.u32 %r61, %r99, {width}, %r60; mad.wide.u32 %d50, %r99, {width}, %d0;
        mad.lo.u32 %r62, %r99, {width}, %r60; mad.wide.u32 %d51, %r99, {width}, %d1;"""
    for i in range(4):
        start += f"cp.async.ca.shared.global [%r61+{row * i}], [%d50+{row * i}], {width}; cp.async.commit_group;"

    def read(waits, i):
        return f"""cp.async.wait_group {waits}; ld.shared.{vector} {names}, [%r62+{row * i}];
            st.global.{vector} [%d51+{row * i}], {names};"""

    launch(kernel(start + "".join(read(3 - i, i) for i in range(4)), 2, 32, 8192), [x, y], **order)
    assert (x == y).all()
    if order == {"late": True}:
        with pytest.raises(Fault, match="race"):
            launch(kernel(start + read(3, 1), 2, 32, 8192), [x, y], **order)


def test_cp_async_leaves_zeros_where_it_copies_nothing():
    x, y = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """mov.u32 %r60, smem; mad.lo.u32 %r61, %r99, 4, %r60; mad.wide.u32 %d50, %r99, 4, %d0;
        mad.wide.u32 %d51, %r99, 4, %d1; setp.lt.u32 %p1, %r99, 10; selp.b32 %r5, 4, 0, %p1;
        @!%p1 add.s64 %d50, %d50, 4096;
        cp.async.ca.shared.global [%r61], [%d50], 4, %r5; cp.async.wait_all;
        ld.shared.b32 %r70, [%r61]; st.global.b32 [%d51], %r70;"""
    launch(kernel(body, 2, 32, 128), [x, y])
    assert y.tolist() == [*range(1, 11), *[0] * 22]


# One warp fills a buffer of two stages, the other drains it; both count phases.
PIPE = """
    mov.u32 %r60, smem; mov.u32 %r1, 0; and.b32 %r90, %r99, 31; setp.ne.u32 %p1, %r99, 0;
    @%p1 bra MADE;
    mbarrier.init.shared::cta.b64 [%r60], 32; mbarrier.init.shared::cta.b64 [%r60+8], 32;
    mbarrier.init.shared::cta.b64 [%r60+16], 32; mbarrier.init.shared::cta.b64 [%r60+24], 32;
    MADE: bar.sync 0;
    setp.ge.u32 %p2, %r99, 32; mad.wide.u32 %d50, %r90, 4, %d0; mad.wide.u32 %d51, %r90, 4, %d1;
    LOOP: and.b32 %r2, %r1, 1; shr.u32 %r3, %r1, 1; mad.lo.u32 %r61, %r2, 8, %r60;
    mad.lo.u32 %r62, %r2, 128, %r60; mad.lo.u32 %r62, %r90, 4, %r62;
    @%p2 bra DRAIN;
    and.b32 %r4, %r3, 1; xor.b32 %r4, %r4, {fill};
    W1: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r61+16], %r4; @!%p3 bra W1;
    ld.global.b32 %r70, [%d50]; st.shared.b32 [%r62+64], %r70;
    {arrive_full}
    bra NEXT;
    DRAIN: and.b32 %r4, %r3, 1; xor.b32 %r4, %r4, {drain};
    W2: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r61], %r4; @!%p3 bra W2;
    ld.shared.b32 %r70, [%r62+64]; st.global.b32 [%d51], %r70;
    {arrive_empty}
    NEXT: add.s64 %d50, %d50, 128; add.s64 %d51, %d51, 128; add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 7;
    @%p4 bra LOOP;"""
RIGHT = {
    "fill": 1, "drain": 0, "arrive_full": "mbarrier.arrive.shared::cta.b64 _, [%r61];",
    "arrive_empty": "mbarrier.arrive.shared::cta.b64 %d60, [%r61+16];",
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change, what", [
    ({}, None), ({"fill": 0}, "deadlock"), ({"drain": 1}, "race|nobody wrote|deadlock"), 
    ({"arrive_empty": ""}, "deadlock"),
    ({"arrive_full": "mbarrier.arrive.shared::cta.b64 _, [%r61], 2;"}, "more arrivals|deadlock"),
    ({"arrive_full": "mbarrier.arrive.shared::cta.b64 _, [%r61+16];"}, "more arrivals|deadlock|race|nobody wrote"),
])  # fmt: skip
def test_mbarrier_phases(change, what, order):
    x, y = np.arange(7 * 32, dtype=np.uint32), np.zeros(7 * 32, np.uint32)
    program = kernel(PIPE.format(**RIGHT | change), 2, 64, 512)
    if what is None:
        launch(program, [x, y], **order)
        assert (x == y).all()
    else:
        with pytest.raises(Fault, match=what):
            launch(program, [x, y], **order)


def swizzled(box: np.ndarray, swizzle: int) -> np.ndarray:
    """The bytes of a box as they lie in shared memory: of each line of 128 bytes, 16-byte chunks change places."""
    chunks = np.ascontiguousarray(box).view(np.uint8).reshape(-1, 16)
    out = np.zeros_like(chunks)
    for number, chunk in enumerate(chunks):
        out[number ^ number // 8 % (1 << swizzle)] = chunk
    return out.ravel()


def clipped(x: np.ndarray, start, box) -> np.ndarray:
    """The box of `x` that begins at `start`, zeros outside."""
    out = np.zeros(box, x.dtype)
    for at in itertools.product(*(range(n) for n in box)):
        where = tuple(s + i for s, i in zip(start, at, strict=True))
        if all(0 <= w < n for w, n in zip(where, x.shape, strict=True)):
            out[at] = x[where]
    return out


TMA = """
    mov.u32 %r60, smem; mov.b64 %d70, map0; cvta.param.u64 %d71, %d70; setp.ne.u32 %p1, %r99, 0;
    @%p1 bra MADE;
    mbarrier.init.shared::cta.b64 [%r60], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r60], {bytes};
    cp.async.bulk.tensor.{dims}d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r60+1024], [%d71, {{{coords}}}], [%r60];
    MADE: bar.sync 0;
    W1: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r60], 0; @!%p2 bra W1;
    {then}"""
TO_GLOBAL = """
    mov.u32 %r1, 0; mad.lo.u32 %r61, %r99, 16, %r60; mad.wide.u32 %d51, %r99, 16, %d1;
    L: ld.shared.v4.b32 {{%r70, %r71, %r72, %r73}}, [%r61+1024]; st.global.v4.b32 [%d51], {{%r70, %r71, %r72, %r73}};
    add.u32 %r61, %r61, 512; add.s64 %d51, %d51, 512; add.u32 %r1, %r1, 512; setp.lt.u32 %p3, %r1, {size};
    @%p3 bra L;"""
BOXES = [
    ((40, 24), np.uint16, (16, 64), 3, (0, 0)), ((40, 72), np.uint16, (16, 64), 3, (32, 16)),
    ((40, 24), np.uint16, (8, 32), 2, (-3, -5)), ((40, 24), np.uint16, (32, 16), 1, (20, 12)),
    ((40, 24), np.float32, (16, 32), 3, (30, -8)), ((64, 8), np.float32, (64, 8), 0, (50, 0)),
    ((300,), np.uint16, (256,), 0, (100,)), ((5, 9, 16), np.uint16, (2, 4, 64), 3, (4, -1, 0)),
    ((40, 48), np.uint8, (16, 64), 0, (-1, 16)),
]  # fmt: skip


def described(x: torch.Tensor, box, swizzle):
    return lambda memory: tensor_map(memory.address(x), x, box, swizzle)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape, dtype, box, swizzle, start", BOXES)
def test_tma_load(shape, dtype, box, swizzle, start, order):
    x = np.arange(1, 1 + np.prod(shape)).astype(dtype).reshape(shape)
    size = int(np.prod(box)) * x.itemsize
    out = np.zeros(-(-size // 512) * 512, np.uint8)
    coords = ", ".join(str(c) for c in reversed(start))
    then = TO_GLOBAL.format(size=size)
    body = TMA.format(bytes=size, dims=len(shape), coords=coords, then=then)
    t = torch.from_numpy(x.view(np.int16) if dtype == np.uint16 else x)
    program = kernel(body, 2, 32, 1024 + out.size, 1)
    launch(program, [np.zeros(4, np.uint8), out], [described(t, box, swizzle)], **order)
    assert (out[:size] == swizzled(clipped(x, start, box), swizzle)).all()
    for bytes, what in ((size + 16, "deadlock"), (size - 16, "deadlock|more")):
        with pytest.raises(Fault, match=what):
            wrong = kernel(
                TMA.format(bytes=bytes, dims=len(shape), coords=coords, then=then), 2, 32, 1024 + out.size, 1
            )
            launch(wrong, [np.zeros(4, np.uint8), out], [described(t, box, swizzle)], **order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape, dtype, box, swizzle, start", [b for b in BOXES if b[1] != np.uint8])
def test_tma_store(shape, dtype, box, swizzle, start, order):
    """What a load brought, swizzled, goes out through a map of another tensor."""
    x = np.arange(1, 1 + np.prod(shape)).astype(dtype).reshape(shape)
    t, y = (torch.from_numpy(v.view(np.int16) if dtype == np.uint16 else v) for v in (x, np.zeros_like(x)))
    coords = ", ".join(str(c) for c in reversed(start))
    then = f"""mov.b64 %d72, map1; cvta.param.u64 %d73, %d72; @%p1 ret;
        cp.async.bulk.tensor.{len(shape)}d.global.shared::cta.bulk_group [%d73, {{{coords}}}], [%r60+1024];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"""
    size = int(np.prod(box)) * x.itemsize
    text = TMA.format(bytes=size, dims=len(shape), coords=coords, then=then)
    maps = [described(t, box, swizzle), described(y, box, swizzle)]
    launch(kernel(text, 1, 32, 1024 + size, 2), [np.zeros(4, np.uint8)], maps, **order)
    inside = np.zeros(shape, bool)
    inside[tuple(slice(max(s, 0), max(s + b, 0)) for s, b in zip(start, box, strict=True))] = True
    assert (y.numpy() == np.where(inside, x.view(y.numpy().dtype), 0)).all()
    if order == {"late": True}:
        with pytest.raises(Fault, match="still read"):
            text = text.replace("cp.async.bulk.wait_group.read 0;", "")
            launch(kernel(text, 1, 32, 1024 + size, 2), [np.zeros(4, np.uint8)], maps, **order)


def test_bulk_copy_of_a_run():
    x, y = np.arange(1024, dtype=np.uint8), np.zeros(512, np.uint8)
    body = """mov.u32 %r60, smem; setp.ne.u32 %p1, %r99, 0; @%p1 bra MADE;
        mbarrier.init.shared::cta.b64 [%r60], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r60], 512;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r60+1024], [%d0+32], 512, [%r60];
        MADE: bar.sync 0;
        W1: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r60], 0; @!%p2 bra W1;
        @%p1 ret; cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r60+1024], 512;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    launch(kernel(body, 2, 32, 2048), [x, y])
    assert (y == x[32:544]).all()


def test_generic_writes_want_a_fence_before_a_bulk_store():
    body = """mov.u32 %r60, smem; mad.lo.u32 %r61, %r99, 4, %r60; st.shared.b32 [%r61], %r99; {} bar.sync 0;
        setp.ne.u32 %p1, %r99, 0; @%p1 ret; cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r60], 256;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"""
    y = np.zeros(64, np.uint32)
    launch(kernel(body.format("fence.proxy.async.shared::cta;"), 1, 64, 256), [y])
    assert (y == np.arange(64)).all()
    with pytest.raises(Fault, match=r"fence\.proxy"):
        launch(kernel(body.format(""), 1, 64, 256), [y])


@pytest.mark.parametrize("change", [
    {"address": 8}, {"strides": (2, 40)}, {"box": (257, 1)}, {"box": (12, 4)}, {"box": (128, 4), "swizzle": 3},
])  # fmt: skip
def test_maps_that_cannot_be_encoded(change):
    good = {"address": 0, "itemsize": 2, "shape": (64, 64), "strides": (2, 128), "box": (64, 8), "swizzle": 3}
    TensorMap(**good)
    with pytest.raises(Fault):
        TensorMap(**good | change)
