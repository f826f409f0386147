"""Every path on a real GPU: the float64 reference, and what only a GPU has. Skipped without one."""

from __future__ import annotations

import time
from dataclasses import replace

import accuracy
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import check, tuning
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem, draw_seed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=PATHS)
def path(request):
    reason = PATHS[request.param].why_not(DEVICE, None)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def drawn(path, M, N, K, R, dtype, *, dropout_p=0.0, seed=0, **options):
    """Inputs on the GPU, and with dropout the mask that the next call draws; the generator is left where it was.

    Skips where `path` takes no such problem.
    """
    if path:
        kind = options.get("adapter_dtype", dtype)
        reason = PATHS[path].why_not(DEVICE, Problem(M, N, K, R, dtype, kind, DEVICE, dropout_p > 0.0))
        if reason:
            pytest.skip(reason)
    inputs = accuracy.draw(M, N, K, R, dtype, device=DEVICE, seed=seed, **options)
    if dropout_p:
        torch.manual_seed(seed)
        mask = PATHS[path].mask(draw_seed(DEVICE), M, K, dropout_p)
        inputs = replace(inputs, dropout_p=dropout_p, mask=mask)
    torch.manual_seed(seed)
    return inputs


def leaves(inputs):
    return [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]


def step(inputs, path, tensors=None):
    """Forward and backward: Y, dX, dA, dB."""
    x, lora_A, lora_B = tensors or leaves(inputs)
    y = fastlora.lora_linear(x, inputs.weight, lora_A, lora_B, inputs.bias, inputs.scaling, inputs.dropout_p, path=path)
    return y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 2, 7, 16, 33, 64, 128])
def test_ranks_and_dtypes(path, dtype, R):
    accuracy.check(fastlora.lora_linear, drawn(path, 130, 72, 104, R, dtype, seed=R), path=path)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (37, 53, 41, 3), (64, 128, 100, 2), (1, 4096, 2048, 16), (129, 257, 511, 9), (960, 768, 768, 16)],
)
def test_shapes_and_dropout(path, shape, dropout_p):
    inputs = drawn(path, *shape, torch.bfloat16, dropout_p=dropout_p)
    accuracy.check(fastlora.lora_linear, inputs, path=path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_layer_with_dropout(path, dtype):
    inputs = drawn(path, 2048, 4096, 1024, 16, dtype, dropout_p=0.1)
    accuracy.check(fastlora.lora_linear, inputs, path=path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float32_adapters_over_a_16_bit_base(path, dtype, dropout_p):
    inputs = drawn(path, 256, 384, 192, 8, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p)
    got = accuracy.check(fastlora.lora_linear, inputs, path=path)
    assert got["dA"].dtype is got["dB"].dtype is torch.float32


def test_tf32_when_torch_allows_it(path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        accuracy.check(fastlora.lora_linear, drawn(path, 512, 256, 1024, 16, torch.float32), path=path)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every second", "expanded", "unaligned"])
def test_strides(path, layout):
    inputs = drawn(path, 64, 96, 80, 8, torch.bfloat16)

    def laid_out(t):
        M, K = t.shape
        if layout == "transposed":
            return t.t().contiguous().t()
        if layout == "expanded":
            return t[:1].expand(M, K)
        wide = torch.full((M, 2 * K + 1), float("nan"), device=DEVICE, dtype=t.dtype)
        start, stop, every = {"sliced": (K, 2 * K, 1), "every second": (0, 2 * K, 2), "unaligned": (1, K + 1, 1)}[
            layout
        ]
        view = wide[:, start:stop:every]
        view.copy_(t)
        return view

    x, dy = laid_out(inputs.x), laid_out(inputs.dy)
    lora_A, lora_B = (t.detach().requires_grad_() for t in (inputs.lora_A, inputs.lora_B))
    x = x.detach().requires_grad_()
    y = fastlora.lora_linear(x, inputs.weight, lora_A, lora_B, inputs.bias, inputs.scaling, path=path)
    dx, dA, dB = torch.autograd.grad(y, (x, lora_A, lora_B), dy)
    got = {"Y": y.detach(), "dX": dx, "dA": dA, "dB": dB}
    assert not accuracy.violations(got, replace(inputs, x=x.detach().contiguous(), dy=dy.contiguous()))


def test_results_repeat_bit_for_bit(path):
    inputs = drawn(path, 1000, 768, 768, 16, torch.bfloat16, dropout_p=0.1, seed=3)
    first = step(inputs, path)
    torch.manual_seed(3)
    for one, again in zip(first, step(inputs, path), strict=True):
        assert torch.equal(one, again)


def test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_parameters(path):
    inputs = drawn(path, 128, 96, 64, 8, torch.float32)
    tensors = leaves(inputs)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = fastlora.lora_linear(tensors[0], inputs.weight, *tensors[1:], inputs.bias, inputs.scaling, path=path)
    gradients = torch.autograd.grad(y, tensors, inputs.dy.bfloat16())
    assert y.dtype is torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    low = inputs.map(lambda t: t.bfloat16())
    low = replace(low, lora_A=inputs.lora_A, lora_B=inputs.lora_B)
    got = {"Y": y.detach(), "dX": gradients[0].bfloat16(), "dA": gradients[1], "dB": gradients[2]}
    assert not accuracy.violations(got, low)


def test_checkpoint_draws_forwards_mask_again(path):
    inputs = drawn(path, 256, 128, 192, 8, torch.float16, dropout_p=0.5, seed=5)
    plain = step(inputs, path)
    torch.manual_seed(5)
    x, lora_A, lora_B = leaves(inputs)

    def layer(x):
        return fastlora.lora_linear(x, inputs.weight, lora_A, lora_B, inputs.bias, inputs.scaling, 0.5, path=path)

    y = checkpoint(layer, x, use_reentrant=False)
    torch.rand(100, device=DEVICE)  # what other layers draw between forward and backward
    for one, other in zip(plain, (y, *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.dy)), strict=True):
        assert torch.equal(one, other)


def captured(inputs, path, tensors):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(inputs, path, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs, path, tensors)
    return graph, results


def test_graph_replay_gives_what_plain_calls_give(path):
    inputs = drawn(path, 512, 384, 256, 16, torch.bfloat16)
    tensors = leaves(inputs)
    graph, results = captured(inputs, path, tensors)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn_like(t) * 0.1)
    graph.replay()
    for one, other in zip(results, step(inputs, path, tensors), strict=True):
        assert torch.equal(one, other)


def test_each_graph_replay_draws_a_new_mask(path):
    inputs = drawn(path, 128, 64, 256, 8, torch.float32, dropout_p=0.5)
    graph, results = captured(inputs, path, leaves(inputs))
    graph.replay()
    first = [t.clone() for t in results]
    graph.replay()
    assert not torch.equal(first[0], results[0])
    assert not torch.equal(first[2], results[2])


def test_a_side_stream_sees_and_leaves_ordered_memory(path):
    inputs = drawn(path, 1024, 768, 768, 16, torch.float16)
    expected = step(inputs, path)
    side = torch.cuda.Stream()
    for _ in range(5):
        torch.cuda._sleep(5_000_000)  # the default stream is busy, and must not be what orders the work
        with torch.cuda.stream(side):
            got = step(inputs, path)
            torch.cuda._sleep(1_000_000)
        side.synchronize()
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_gpu(path):
    inputs = drawn(path, 256, 128, 192, 8, torch.bfloat16, dropout_p=0.1)
    tensors = leaves(inputs)
    step(inputs, path, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, path, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocated():
    """Bytes in use when nothing runs: autograd's own thread drops a step's gradients after handing them out."""
    torch.cuda.synchronize()
    time.sleep(0.05)
    return torch.cuda.memory_allocated()


def test_steps_leak_no_memory(path):
    inputs = drawn(path, 512, 384, 256, 8, torch.bfloat16, dropout_p=0.1)
    tensors = leaves(inputs)
    step(inputs, path, tensors)
    before = allocated()
    for _ in range(20):
        step(inputs, path, tensors)
    assert allocated() == before


@pytest.mark.parametrize("path", ["hybrid", "onepass", "split"])
def test_nothing_as_large_as_x_is_kept_for_backward(path):
    M, N, K, R = 4096, 512, 1024, 16
    inputs = drawn(path, M, N, K, R, torch.bfloat16, dropout_p=0.1)
    tensors = leaves(inputs)
    step(inputs, path, tensors)
    before = allocated()
    y = fastlora.lora_linear(tensors[0], inputs.weight, *tensors[1:], inputs.bias, 2.0, 0.1, path=path)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    assert kept <= 2 * M * R + 4096  # S, and a seed


@pytest.mark.xdist_group("large")  # one after the other: two at once do not fit
def test_offsets_beyond_31_bits(path, monkeypatch):
    if torch.cuda.mem_get_info(DEVICE)[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    monkeypatch.setattr(check, "admit", lambda *_: None)  # which would compare all of it in float64
    M, N, K, R, tail = 65_600, 16, 32_768, 8, 64
    small = accuracy.draw(tail, N, K, R, torch.bfloat16, device=DEVICE)
    x = torch.zeros(M, K, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros(M, N, dtype=torch.bfloat16, device=DEVICE)
    x[-tail:], dy[-tail:] = small.x, small.dy
    y, dx, dA, dB = step(replace(small, x=x, dy=dy), path)
    got = {"Y": y[-tail:], "dX": dx[-tail:], "dA": dA, "dB": dB}
    assert not accuracy.violations(got, small)
    assert not dx[:-tail].any()
    del x, dy, y, dx, got
    torch.cuda.empty_cache()


def test_compiled_whole_graph_gives_the_rules_results():
    inputs = drawn(None, 128, 96, 64, 8, torch.float32)
    compiled = torch.compile(fastlora.lora_linear, fullgraph=True)
    accuracy.check(compiled, inputs)


def test_the_self_check_passes_on_every_usable_path():
    for name, result in fastlora.selfcheck(DEVICE).items():
        assert result == "ok" or PATHS[name].why_not(DEVICE, None), f"{name}: {result}"


def test_tuning_measures_a_shape_once_and_leaves_random_numbers_alone():
    problem = Problem(200, 96, 64, 8, torch.bfloat16, torch.bfloat16, torch.device("cuda", 0), True)
    state = torch.cuda.get_rng_state()
    row = tuning.measured(problem)
    assert row.winner(captured=False).name in PATHS and row.winner(captured=True).name in PATHS
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert tuning.measured(problem, measure=lambda _: pytest.fail("measured twice")) == row
