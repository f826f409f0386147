"""Lanes and warps together; and memory: what may be touched, by whom, and after what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .launch import Options, Tensors, run
from .memory import Fault
from .micro import kernel, launch

ORDERS = [{}, {"seed": 0}, {"seed": 1}]


def each_lane(body: str, threads: int = 32, **options) -> np.ndarray:
    """What `body` leaves in %r1 of each thread."""
    out = np.zeros(threads, np.uint32)
    launch(
        kernel(f"{body} mad.wide.u32 %d50, %r99, 4, %d0; st.global.b32 [%d50], %r1;", 1, threads, 512), [out], **options
    )
    return out


@pytest.mark.parametrize("mode, b, c, want", [
    ("bfly", 5, 31, lambda i: i ^ 5), ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
    ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i), ("idx", 9, 31, lambda i: 9),
    ("idx", 9, 31 | 24 << 8, lambda i: i // 8 * 8 + 1), ("down", 3, 7 | 24 << 8, lambda i: i + 3 if i % 8 < 5 else i),
    ("bfly", 4, 31 | 24 << 8, lambda i: i ^ 4),
])  # fmt: skip
def test_shfl(mode, b, c, want):
    out = each_lane(
        f"shfl.sync.{mode}.b32 %r2|%p1, %r99, {b}, {c}, 0xffffffff; selp.b32 %r3, 64, 0, %p1; or.b32 %r1, %r2, %r3;"
    )
    for i, v in enumerate(out.tolist()):
        assert v & 31 == want(i) and bool(v & 64) == (want(i) != i or (mode == "idx")), i


def test_votes_and_reductions():
    odd = "and.b32 %r2, %r99, 1; setp.eq.u32 %p1, %r2, 1;"
    assert set(each_lane(odd + "vote.sync.ballot.b32 %r1, %p1, 0xffffffff;")) == {0xAAAAAAAA}
    for mode, want in (("any", 1), ("all", 0), ("uni", 0)):
        assert set(each_lane(odd + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;")) == {want}
    for op, want in (("add.u32", 496), ("max.s32", 31), ("min.u32", 0), ("or.b32", 31), ("xor.b32", 0), ("and.b32", 0)):
        assert set(each_lane(f"redux.sync.{op} %r1, %r99, 0xffffffff;")) == {want}
    elected = each_lane("elect.sync _|%p1, 0xffffffff; selp.b32 %r1, 1, 0, %p1;", 64)
    assert elected.reshape(2, 32).sum(1).tolist() == [1, 1]
    assert set(each_lane(odd + "mov.b32 %r1, 0; @!%p1 bra E; activemask.b32 %r1; E:")[1::2]) == {0xAAAAAAAA}


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_part_and_meet_again(order):
    """A loop of as many turns as the lane's number, then all together."""
    out = each_lane("""mov.u32 %r1, 0; mov.u32 %r2, 0;
        L: setp.ge.u32 %p1, %r2, %r99; @%p1 bra E; add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra L;
        E: redux.sync.add.u32 %r3, %r2, 0xffffffff; mad.lo.u32 %r1, %r3, 1000, %r1;""", **order)  # fmt: skip
    assert out.tolist() == [496000 + i * (i - 1) // 2 for i in range(32)]


NAMED = """mov.u32 %r60, smem; shr.u32 %r3, %r99, 5; and.b32 %r4, %r3, 1; mad.lo.u32 %r61, %r99, 4, %r60;
    xor.b32 %r5, %r99, 32; mad.lo.u32 %r62, %r5, 4, %r60; shr.u32 %r6, %r99, 6; add.u32 %r6, %r6, 1;
    st.shared.b32 [%r61], %r99; {} ld.shared.b32 %r1, [%r62];"""


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers(order):
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2."""
    out = each_lane(NAMED.format("bar.sync %r6, 64;"), 128, **order)
    assert out.tolist() == [i ^ 32 for i in range(128)]
    wrong = {"": "race|nobody wrote", "bar.sync %r3, 32;": "race|nobody wrote", "bar.sync %r6, 96;": "deadlock",
             "bar.sync 1, 64;": "race|threads at a barrier|nobody wrote"}  # fmt: skip
    for barrier, what in wrong.items():
        with pytest.raises(Fault, match=what):
            for seed in range(8):
                each_lane(NAMED.format(barrier), 128, seed=seed)


@pytest.mark.parametrize("order", ORDERS)
def test_arrive_without_waiting(order):
    body = """mov.u32 %r60, smem; setp.ge.u32 %p1, %r99, 32; and.b32 %r90, %r99, 31; mad.lo.u32 %r61, %r90, 4, %r60;
        mov.u32 %r1, 7; @%p1 bra READ; st.shared.b32 [%r61], %r99; bar.arrive 3, 64; bra E;
        READ: {} ld.shared.b32 %r1, [%r61]; E:"""
    assert each_lane(body.format("bar.sync 3, 64;"), 64, **order).tolist() == [7] * 32 + list(range(32))
    with pytest.raises(Fault, match=r"race|nobody wrote|deadlock"):
        each_lane(body.format(""), 64, **order)


def test_a_warp_waits_for_its_lane_that_polls():
    """Lane 0 waits for another warp's flag in shared memory while the others wait for lane 0."""
    body = """mov.u32 %r60, smem; setp.ge.u32 %p1, %r99, 32; setp.ne.u32 %p2, %r99, 0; setp.ne.u32 %p4, %r99, 32;
        @!%p2 st.shared.b32 [%r60], 0; bar.sync 0; mov.u32 %r1, 5; @%p1 bra RAISE; @%p2 bra MEET;
        POLL: ld.volatile.shared.b32 %r2, [%r60]; setp.eq.u32 %p3, %r2, 0; @%p3 bra POLL;
        MEET: bar.warp.sync 0xffffffff; redux.sync.add.u32 %r1, %r99, 0xffffffff; bra E;
        RAISE: {} E:"""
    for order in ORDERS:
        out = each_lane(body.format("@!%p4 st.volatile.shared.b32 [%r60], 1;"), 64, **order)
        assert out.tolist() == [496] * 32 + [5] * 32
    with pytest.raises(Fault, match="deadlock"):
        each_lane(body.format(""), 64)
    with pytest.raises(Fault, match="no end"):
        each_lane("L: bra L;", steps=1000)


def test_launch_dependents_and_registers_change_no_number():
    body = "griddepcontrol.wait; griddepcontrol.launch_dependents; setmaxnreg.inc.sync.aligned.u32 232; mov.u32 %r1, 3;"
    assert set(each_lane(body, 128)) == {3}
    with pytest.raises(Fault, match="registers"):
        each_lane(body.replace("232", "230"), 128)


def test_a_warp_changes_its_registers_with_its_group_and_keeps_them_alone():
    body = """setp.ge.u32 %p1, %r99, 32; mov.u32 %r1, 3; {} @%p1 bra E; setmaxnreg.inc.sync.aligned.u32 24; E:"""
    assert set(each_lane(body.format("setmaxnreg.dec.sync.aligned.u32 24;"), 128)) == {3}
    for before in ("", "setmaxnreg.dec.sync.aligned.u32 32;"):
        with pytest.raises(Fault, match="deadlock"):
            each_lane(body.format(before), 128)


def test_a_branch_by_number():
    body = """and.b32 %r2, %r99, 3; mov.u32 %r1, 7; setp.eq.u32 %p1, %r2, 3; {}
        T: .branchtargets A, B, A; brx.idx %r2, T; A: mov.u32 %r1, 1; bra E; B: mov.u32 %r1, 2; E:"""
    assert each_lane(body.format("@%p1 bra E;"), 32).tolist() == [1, 2, 1, 7] * 8
    with pytest.raises(Fault, match="reached"):
        each_lane(body.format(""), 32)


def touch(tensors, body: str, written=(True, True)) -> None:
    memory = Tensors()
    run(
        kernel(body, len(tensors)),
        [memory.address(t, w) for t, w in zip(tensors, written, strict=False)],
        (1,),
        32,
        memory,
    )
    memory.fetch()


@pytest.mark.parametrize("access, what", [
    ("ld.global.b32 %r1, [%d0+396];", None), ("ld.global.b32 %r1, [%d0+400];", "out of bounds"),
    ("ld.global.b32 %r1, [%d0+-4];", "out of bounds"), ("st.global.b32 [%d0+400], %r1;", "out of bounds"),
    ("ld.global.b32 %r1, [%d0+2];", "multiple"), ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+392];", "multiple"),
    ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+384];", None), ("ld.global.b32 %r1, [%d1];", "nobody wrote"),
    ("ld.global.b32 %r1, [0];", "no memory"), ("mov.u32 %r60, smem; ld.shared.b32 %r1, [%r60];", "nobody wrote"),
    ("mov.u32 %r60, smem; st.shared.b32 [%r60+64], %r1;", "outside"), ("st.shared.b32 [0], %r1;", "outside"),
])  # fmt: skip
def test_bounds_alignment_and_first_use(access, what):
    memory = Tensors()
    tensors = [torch.zeros(100), torch.zeros(100)]
    addresses = [memory.address(t, i == 0) for i, t in enumerate(tensors)]
    program = kernel(access, 2, shared=64)
    if what is None:
        run(program, addresses, (1,), 32, memory)
    else:
        with pytest.raises(Fault, match=what):
            run(program, addresses, (1,), 32, memory)


def test_between_the_rows_of_a_view():
    view = torch.zeros(8, 20)[1:7, 2:12]
    touch([view], "ld.global.b32 %r1, [%d0+36]; st.global.b32 [%d0+80], %r1;")
    for offset in (-4, 40, 76, 6 * 80):
        with pytest.raises(Fault, match="out of bounds"):
            touch([view], f"ld.global.b32 %r1, [%d0+{offset}];")


def test_a_tensor_larger_than_memory_should_be():
    """Rows 2^31 elements apart: an offset kept in 32 bits would be somewhere else."""
    view = torch.empty(2**31 + 64, dtype=torch.int8).as_strided((2, 32), (2**31, 1))
    view.fill_(3)
    touch(
        [view], "cvt.u64.u32 %d50, %r99; add.s64 %d50, %d50, %d0; mov.b32 %r1, 5; st.global.b8 [%d50+2147483648], %r1;"
    )
    assert view.tolist() == [[3] * 32, [5] * 32]


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_may_not_touch_each_others_bytes(order):
    body = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d50, %r1, {}, %d0; st.global.b32 [%d50+4], %r1;"
    body += "ld.global.b32 %r2, [%d50+{}];"
    launch(kernel(body.format(4, 4), 1), [np.zeros(8, np.uint32)], grid=4, **order)
    for step, offset in ((0, 4), (4, 0)):
        with pytest.raises(Fault, match="another wrote"):
            launch(kernel(body.format(step, offset), 1), [np.zeros(8, np.uint32)], grid=4, **order)


def test_a_seed_repeats_its_schedule():
    """Which of two warps comes first is chance; the same chance each time."""
    body = """mov.u32 %r60, smem; setp.eq.u32 %p1, %r99, 0; @%p1 st.shared.b32 [%r60], 0; bar.sync 0;
        and.b32 %r2, %r99, 31; setp.eq.u32 %p2, %r2, 0; mov.b32 %r1, 9; @%p2 atom.shared.add.u32 %r1, [%r60], 1;"""
    firsts = [each_lane(body, 64, seed=seed)[0] for seed in range(12)]
    assert firsts == [each_lane(body, 64, seed=seed)[0] for seed in range(12)] and set(firsts) == {0, 1}
    assert Options().seed is None
