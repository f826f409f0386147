"""Records of a path's launches: how they are made, what they refuse, and what the node hands to a driver. No GPU is
needed: Triton compiles for one that is not there, and a stand-in for the driver tells what it was given."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from campaigns import launches, sync

import fastlora
from fastlora import autograd, check, check_shared, choice, functional, node, record
from fastlora.kernels.tiles import WARP_SPECIALISED
from fastlora.node import NODE
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem, Update
from fastlora.paths.shared import SHARED, Needs, Projection

ALL = Needs(True, (True,) * 3, (True,) * 3)
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Compiled:
    """What Triton compiled, as if a driver had loaded it."""

    def __init__(self, kernel) -> None:
        self.metadata, self.src, self.asm, self.name = kernel.metadata, kernel.src, kernel.asm, kernel.name
        self.memory = ctypes.c_int(1 << 20)  # what the stand-in's functions point to: bytes of shared memory allowed
        self.function = ctypes.addressof(self.memory)


@pytest.fixture
def imaginary_gpu(monkeypatch):
    """Launches on tensors of the CPU compile for sm_90, and go nowhere."""
    pytest.importorskip("triton")
    from fastlora.kernels import launch, tiles

    target = tiles.Target("cuda", 90)

    def run(self):
        record.recorded.get().append((self, Compiled(self.compile(target))))

    monkeypatch.setattr(launch.Launch, "run", run)
    monkeypatch.setattr(tiles, "target_of", lambda device: target)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device, target: 132)
    monkeypatch.setattr(record, "kernels", set())
    monkeypatch.setattr(launches, "_known", {})


@pytest.fixture
def driver(tmp_path) -> str:
    """A library that stands in for the driver, and takes any address for a GPU's."""
    if NODE is None or sync.compiler_missing():
        pytest.skip(sync.compiler_missing() or "the node in C++ was not compiled here")
    path = str(sync.build(tmp_path))
    register = ctypes.CDLL(path).cudaHostRegister
    register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    register(1, 2**62, 0)
    return path


def tensors(M=64, N=96, K=128, R=8):
    x, weight, bias = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    return x, weight, torch.randn(R, K), torch.randn(N, R), bias, torch.tensor(7)


def observe(path, x, weight, lora_A, lora_B, bias, seed):
    update = Update(lora_A, lora_B, 2.0, 0.25, seed)
    inputs = (x, weight, lora_A, lora_B, bias, seed)
    return record.observe(lambda: path.forward(x, weight, bias, update), inputs, (True, True))


def expected(launch, kernel) -> tuple[tuple, tuple]:
    """What the driver is to be given for `launch`, packed by ctypes from the kernel's signature."""
    numbers, addresses = [], []
    for name, kind in kernel.src.signature.items():
        value = launch.args[name]
        if kind.startswith("*"):
            addresses.append(value.data_ptr())
            numbers.append(b"")
        elif kind.startswith("tensordesc"):
            addresses.append(value.base.data_ptr())
            numbers.append(...)  # the rest of the map: tests.campaigns.launches has Triton's own
            numbers += [bytes(ctypes.c_int32(n)) for n in value.shape] + [
                bytes(ctypes.c_int64(n)) for n in value.strides
            ]
        elif kind != "constexpr":
            numbers.append(bytes(C_TYPES[kind](value)))
    numbers += [bytes(8)] * 2
    meta = kernel.metadata
    sizes = *(*launch.grid, 1, 1)[:3], 32 * meta.num_warps, 1, 1, meta.shared
    return ("launch", kernel.function, *sizes, None, b"", *numbers), tuple(addresses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_done_again_with_their_factors_and_on_scratch_memory(driver, dtype):
    def given(seed):
        generator = torch.Generator().manual_seed(seed)
        x, weight, A, B, bias = (
            torch.randn(*size, generator=generator, dtype=dtype) for size in ((5, 6), (4, 6), (2, 6), (4, 2), (4,))
        )
        return x, weight, A, B.half(), bias

    nothing = torch.empty((), dtype=dtype)

    def call(x, weight, A, B, bias):
        y, out = torch.addmm(bias, x, weight.t()), torch.empty(6, 5, dtype=dtype)
        S = torch.addmm(nothing, x, A.t(), beta=0, alpha=0.5)
        y.addmm_(S, B.to(dtype).t(), alpha=3.0)
        scratch, other = torch.mm(S, B.to(dtype).t()), torch.mm(B.to(dtype), B.to(dtype).t())
        torch.mm(weight.t(), scratch.t(), out=out)
        out.addmm_(torch.mm(weight.t(), other), scratch.t())
        return y, S, out

    inputs, others = given(0), given(1)
    _, made, obstacle = record.observe(lambda: call(*inputs), inputs, (True,) * 3)
    assert obstacle is None
    for t, wanted in zip(NODE.replay(driver, made, others), call(*others), strict=False):
        torch.testing.assert_close(t, wanted)


KINDS = [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]


@pytest.mark.parametrize("dtype, adapters", KINDS)
@pytest.mark.parametrize("lead", [(6,), (2, 3), ()])
@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, True, False), (True, False, False, True)])
def test_on_a_cpu_the_node_does_again_what_path_torch_did(dtype, adapters, lead, needs, monkeypatch):
    if NODE is None:
        pytest.skip("the node in C++ was not compiled here")
    choice.forget()

    def run(seed):
        draw = torch.Generator().manual_seed(seed)
        sizes = ((*lead, 9), dtype), ((4, 9), adapters), ((7, 4), adapters), ((7,), dtype), ((7, 9), dtype)
        *leaves, weight = (torch.randn(size, generator=draw, dtype=torch.float64).to(kind) for size, kind in sizes)
        dy = torch.randn(*lead, 7, generator=draw).to(dtype)
        wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=True) if need]
        x, A, B, bias = leaves
        y = fastlora.lora_linear(x, weight, A, B, bias, 2.0, path="torch")
        return y, *torch.autograd.grad(y, wanted, dy)

    run(0), run(0)  # what is met but once is not recorded
    served = [run(seed) for seed in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(node, "forward", None)  # nothing of Python's is called
        patch.setattr(node, "backward", None)
        again = [run(seed) for seed in (1, 2)]
    for module in (autograd, functional, node):
        monkeypatch.setattr(module, "NODE", None)
    for found, same, wanted in zip(served, again, [run(seed) for seed in (1, 2)], strict=True):
        for a, b, c in zip(found, same, wanted, strict=True):
            assert torch.equal(a, c) and torch.equal(b, c) and a.stride() == c.stride() and a.dtype is c.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_record_of_the_ops_backward_is_found_by_calls_that_ask_for_the_same(dtype, monkeypatch):
    if NODE is None:
        pytest.skip("the node in C++ was not compiled here")
    choice.forget()
    x, weight, A, B, dy = (torch.randn(size, dtype=dtype) for size in ((20, 9), (7, 9), (40, 9), (7, 40), (20, 7)))
    fastlora.lora_linear(x, weight, A, B)  # chooses

    def run(*needs):
        S = x @ A.t()
        return torch.ops.fastlora.backward(dy, x, weight, A, B, S, 2.0, 0.0, None, "", *needs)

    every = [run(True, True, True) for _ in range(3)][-1]
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        (found,) = (t for t, need in zip(run(*needs), needs, strict=True) if need)
        (wanted,) = (t for t, need in zip(every, needs, strict=True) if need)
        torch.testing.assert_close(found, wanted)
    monkeypatch.setattr(node, "backward", None)  # nothing of Python's is called
    assert all(torch.equal(a, b) for a, b in zip(run(True, True, True), every, strict=True))


def test_a_call_on_a_cpu_loads_neither_triton_nor_a_compiler():
    call = "f.lora_linear(t(2, 3), t(4, 3), t(1, 3), t(4, 1), path='torch')"
    loaded = "assert not {'triton', 'torch._dynamo'} & set(sys.modules)"
    code = f"import sys, torch, fastlora as f; t = torch.ones; {loaded}; {call}; {call}; {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as published."""
    for i in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        k = [(key[j] + i * step) & 0xFFFFFFFF for j, step in enumerate((0x9E3779B9, 0xBB67AE85))]
        counter = [b >> 32 ^ counter[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ k[1], a & 0xFFFFFFFF]
    return counter


def test_a_gpus_random_integers_are_philoxs():
    if NODE is None:
        pytest.skip("the node in C++ was not compiled here")
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # of Random123's known answers
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    for seed, draw, thread in ((0, 0, 0), (2**64 - 1, 2**40 + 3, 6), (0x0123_4567_89AB_CDEF, 255, 2**33)):
        first, second, *_ = philox(
            [draw & 0xFFFFFFFF, draw >> 32, thread & 0xFFFFFFFF, thread >> 32], [seed & 0xFFFFFFFF, seed >> 32]
        )
        assert NODE.randint(seed, 4 * draw, thread) == (first << 32 | second) % (2**63 - 1)


SPECIALISED = PATHS["split"].with_tiles({"gemm": WARP_SPECIALISED})


# a product of ATen's; tensor maps; and more warps than the launch asks for
@pytest.mark.parametrize("path", [PATHS["hybrid"], PATHS["split"], SPECIALISED], ids=lambda path: path.label)
def test_a_driver_is_given_what_the_launches_say(path, imaginary_gpu, driver, monkeypatch):
    from fastlora.kernels import launch

    seen = []
    run = launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: (run(self), seen.append(record.recorded.get()[-1])))
    x, weight, lora_A, lora_B, *rest = tensors()
    inputs = x, weight, lora_A.bfloat16(), lora_B.bfloat16(), *rest
    (y, S), made, obstacle = observe(path, *inputs)
    assert obstacle is None and seen
    assert path is not SPECIALISED or seen[-1][1].metadata.num_warps == 12
    trace = launches.Trace(driver)
    found = NODE.replay(driver, made, inputs)
    rows = trace.take()
    assert [(t.shape, t.dtype) for t in found[:2]] == [(t.shape, t.dtype) for t in (y, S)]
    wanted = [expected(*one) for one in seen]
    assert (path.name == "split") == any(... in same for same, _ in wanted)
    for (same, _), (given, _) in zip(wanted, rows, strict=True):
        assert given == tuple(b if a is ... else a for a, b in zip(same, given, strict=True))
    fixed = {a.data_ptr(): b.data_ptr() for a, b in zip((*inputs, y, S), (*inputs, *found[:2]), strict=True)}
    assert not launches.differences([("", old) for _, old in wanted], [("", new) for _, new in rows], fixed)[0]


@pytest.mark.parametrize("path", ["hybrid", "split"])
def test_a_driver_is_given_what_the_launches_of_several_projections_say(path, imaginary_gpu, driver, monkeypatch):
    from fastlora.kernels import launch

    seen = []
    run = launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: (run(self), seen.append(record.recorded.get()[-1])))
    many = [tensors(N=N, R=R)[:5] for N, R in ((96, 8), (32, 4), (64, 20))]
    x, seeds = many[0][0], [torch.tensor(i) for i in range(3)]
    updates = [Update(one[2], one[3], 2.0, 0.25, seed) for one, seed in zip(many, seeds, strict=True)]
    each = [Projection(one[1], one[4], update) for one, update in zip(many, updates, strict=True)]
    Ss = [torch.randn(64, u.lora_A.shape[0]).bfloat16() for u in updates]
    dys = [torch.randn(64, one[1].shape[0]).bfloat16() for one in many]
    forward = [t for w, bias, u in each for t in (w, u.lora_A, u.lora_B, bias, u.seed)]
    backward = [
        t for dy, S, (w, _, u) in zip(dys, Ss, each, strict=True) for t in (dy, w, u.lora_A, u.lora_B, S, u.seed)
    ]
    needs = Needs(True, (True,) * 3, (True,) * 3)

    def flat(dx, dAs, dBs):
        return [dx, *dAs, *dBs]

    calls = [
        (forward, 6, lambda: [t for found in SHARED[path].forward(x, each) for t in found]),
        (backward, 7, lambda: flat(*SHARED[path].backward(dys, x, each, Ss, needs))),
    ]
    for inputs, count, call in calls:
        seen.clear()
        outputs, made, obstacle = record.observe(call, (x, *inputs), (True,) * count)
        assert obstacle is None and seen
        trace = launches.Trace(driver)
        found = NODE.replay(driver, made, (x, *inputs))
        rows = trace.take()
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in outputs]
        wanted = [expected(*one) for one in seen]
        for (same, _), (given, _) in zip(wanted, rows, strict=True):
            assert given == tuple(b if a is ... else a for a, b in zip(same, given, strict=True))
        fixed = {a.data_ptr(): b.data_ptr() for a, b in zip((x, *inputs, *outputs), (x, *inputs, *found), strict=True)}
        assert not launches.differences([("", old) for _, old in wanted], [("", new) for _, new in rows], fixed)[0]


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("hybrid", {"up_each_kernel", "ds_db_each_kernel"}),
        ("split", {"gemm_each_kernel", "ds_db_each_kernel", "gemm_sum_tma_kernel"}),
    ],
)
def test_the_self_check_of_projections_that_share_x_names_their_kernels(path, own, monkeypatch):
    pytest.importorskip("triton")
    from fastlora.kernels import tiles

    monkeypatch.setattr(tiles, "target_of", lambda device: tiles.Target("cuda", 90))
    monkeypatch.setattr(tiles, "multiprocessors", lambda device, target: 132)
    kind, gpu = torch.bfloat16, torch.device("cuda", 0)
    problems = [Problem(256, N, 512, 8, kind, kind, gpu, True) for N in (512, 128, 128)]
    kernels = check_shared._kernels(SHARED[path], problems, ALL)
    assert {one.split()[0] for one in kernels} >= {"s_shared_kernel", "da_dx_shared_kernel", *own}
    plain = [one._replace(dropout=False) for one in problems]
    assert check_shared._kernels(SHARED[path], plain, ALL) != kernels
    for needs in (ALL._replace(x=False), ALL._replace(A=(True, False, True)), Needs(False, *((False,) * 3,) * 2)):
        assert check_shared._kernels(SHARED[path], problems, needs) != kernels


def test_what_a_call_would_launch_is_planned_once(monkeypatch):
    planned, kind, gpu = [], torch.bfloat16, torch.device("cuda", 0)
    monkeypatch.setattr(check_shared, "_kernels", lambda *_: planned.append(1) or frozenset())
    monkeypatch.setattr(check, "_verdicts", {})
    check_shared._subject.cache_clear()
    problems = [Problem(4096, N, 512, 8, kind, kind, gpu, True) for N in (512, 128, 128)]
    for M in (4096, 4096, 128):
        problems = [one._replace(M=M) for one in problems]
        assert "not run yet" in check_shared.admit(PATHS["hybrid"], SHARED["hybrid"], problems, ALL, True)
    assert len(planned) == 2
    check_shared._subject.cache_clear()


def test_gradients_at_one_place_leave_no_word_that_there_is_no_record(monkeypatch):
    kept = []

    class Node:
        lacks, keep = staticmethod(lambda *_: True), staticmethod(lambda *call: kept.append(call[-1]))

    monkeypatch.setattr(node, "NODE", Node)
    monkeypatch.setattr(node, "_records", lambda *_: True)
    monkeypatch.setattr(node, "observe", lambda call, *_: (call(), None, "several"))
    x, S, dy = torch.randn(4, 6), torch.randn(4, 2), torch.randn(4, 6)
    many = [
        Projection(torch.randn(6, 6), None, Update(torch.randn(2, 6), torch.randn(6, 2), 1.0, 0.0, None)) for _ in "qk"
    ]
    for other in (dy, dy.clone()):
        dys, needs = [dy, other], Needs(True, (True, True), (True, True))
        node.backward(PATHS["torch"], dys, x, many, [S, S], needs, dys)
    assert kept == [None]  # of the second alone


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda x, *rest: (x.clone(), *rest), "clone"),
        (lambda x, weight, A, B, *rest: (x, weight, A.double().float(), B, *rest), "no input is torch.float64"),
        (lambda x, weight, A, B, *rest: (x, weight, A.bfloat16().float(), B, *rest), "several dtypes"),
        (lambda x, weight, A, B, bias, seed: (x, weight, A, B, CONSTANT, seed), "none of the call's"),
    ],
)
def test_a_call_with_tensors_of_unknown_origin_is_not_recorded(spoil, reason, imaginary_gpu):
    inputs = tensors()
    update = (2.0, 0.25, inputs[5])

    def call():
        x, weight, lora_A, lora_B, bias, _ = spoil(*inputs)
        return PATHS["hybrid"].forward(x, weight, bias, Update(lora_A, lora_B, *update))

    outputs, made, obstacle = record.observe(call, inputs, (True, True))
    assert made is None and reason in obstacle and outputs[0].shape == (64, 96)


CONSTANT = torch.zeros(96, dtype=torch.bfloat16)


def test_a_call_with_two_tensors_at_one_place_is_not_recorded(imaginary_gpu):
    x, _, lora_A, lora_B, bias, seed = tensors(N=64, K=64)
    _, made, obstacle = observe(PATHS["hybrid"], x, x, lora_A, lora_B, bias, seed)
    assert made is None and "several" in obstacle


def test_a_kernel_with_other_parameters_than_it_tells_is_not_recorded(imaginary_gpu, monkeypatch):
    monkeypatch.setattr(record, "sizes_in_ptx", lambda kernel: [8, 8])
    _, made, obstacle = observe(PATHS["hybrid"], *tensors())
    assert made is None and "other parameters" in obstacle


def test_a_path_whose_launches_are_not_seen_is_not_recorded():
    pytest.importorskip("triton")
    x = torch.zeros(2, 3)
    _, made, obstacle = record.observe(lambda: (torch.empty_like(x),), (x,), (True,))
    assert made is None and obstacle == "no launch was seen"


def test_scratch_memory_does_not_overlap(imaginary_gpu):
    taken = [torch.empty(n, dtype=torch.uint8) for n in (1, 300, 256, 0)]
    slots = record._Slots((taken[0],), [], taken)
    assert [slots.of(t) for t in taken[1:3]] == [(1, 0), (1, 512)] and slots.workspace == 768
    assert slots.of(taken[1][17:]) == (1, 17) and slots.of(taken[0]) == (0, 0)
