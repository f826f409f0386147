"""DoRA: its numbers against the reference, the norm, what a layer keeps and saves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastlora
from fastlora import dora, reference
from fastlora.linear import EagerLoRALinear

DTYPES = [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None), (torch.float64, None)]


def draw(M=40, N=56, K=192, R=4, dtype=torch.float32, adapter=None, seed=0):
    """x, weight, lora_A, lora_B, magnitude, bias, dy of a trained layer's scale."""
    generator = torch.Generator().manual_seed(seed)
    x, W, A, B, m, bias, dy = (
        torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (R, K), (N, R), (N,), (N,), (M, N))
    )
    W, A, B = W * K**-0.5, A * K**-0.5, B * R**-0.5
    m = (W + 2.0 * B @ A).norm(dim=1) * (1.0 + 0.1 * m)
    adapter = adapter or dtype
    return [x.to(dtype), W.to(dtype), A.to(adapter), B.to(adapter), m.to(adapter), bias.to(dtype), dy.to(dtype)]


def run(function, x, W, A, B, m, bias, dy, **keywords):
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B, m, bias)]
    y = function(leaves[0], W, leaves[1], leaves[2], leaves[3], leaves[4], 2.0, **keywords)
    y.backward(dy.to(y.dtype))
    return dict(zip(("Y", "dX", "dA", "dB", "dm", "dbias"), [y.detach(), *(leaf.grad for leaf in leaves)], strict=True))


def ours(x, W, A, B, m, bias, scaling, dropout_p=0.0):
    return dora.dora_linear(x, W, A, B, bias, scaling, dropout_p, True, m, dora.Norms())


def violations(got, tensors, **keywords):
    """The rule of `fastlora.accuracy`: twice eager's error, plus two units of the expression on absolute values."""
    x, W, A, B, m, _, dy = tensors
    eager = run(reference.dora_linear, *tensors, **keywords)
    truth = run(reference.dora_linear, *(t.double() for t in tensors), **keywords)
    g = (m / (W.to(A.dtype) + 2.0 * B @ A).norm(dim=1)).double().abs()
    x, W, A, B, bias, dy = (t.double().abs() for t in (x, W, A, B, tensors[5], dy))
    dS = (dy * g) @ B * 2.0
    u = x @ W.t() + 2.0 * x @ A.t() @ B.t()
    sizes = {
        "Y": g * u + x @ W.t() + bias,
        "dX": (dy * (g + 1.0)) @ W + dS @ A,
        "dA": dS.t() @ x,
        "dB": (dy * g).t() @ (x @ A.t()) * 2.0,
        "dm": (dy * u).sum(0) * g / m.double().abs(),
        "dbias": dy.sum(0),
    }
    unit = max(torch.finfo(t.dtype).eps for t in tensors)
    found = []
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        error, allowed = (value.double() - truth[name]).abs(), 2.0 * unit * sizes[name]
        error_eager = (eager[name].double() - truth[name]).abs()
        for size in (torch.max, torch.linalg.vector_norm):
            if not size(error) <= 2.0 * size(error_eager) + size(allowed):
                found.append(f"{name}: {size(error):.3g} over {2 * size(error_eager) + size(allowed):.3g}")
    return found


@pytest.mark.parametrize("dtype, adapter", DTYPES)
def test_error_rule(dtype, adapter):
    tensors = draw(dtype=dtype, adapter=adapter)
    assert not violations(run(ours, *tensors), tensors)


@pytest.mark.parametrize("dtype, adapter", DTYPES)
def test_error_rule_with_dropout(dtype, adapter):
    tensors = draw(dtype=dtype, adapter=adapter)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(tensors[0]), 0.25) != 0
    torch.manual_seed(3)
    assert not violations(run(ours, *tensors, dropout_p=0.25), tensors, mask=mask, dropout_p=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_a_large_weight_in_parts(dtype):
    _, W, A, B, *_ = draw(1, 700, 900, 5, dtype, torch.float32)
    want = (W.double() + 3.0 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(dora.row_norms(W, A, B, 3.0).double(), want, rtol=1e-6, atol=0)


def test_norms_are_kept_for_a_weight_and_its_version_alone():
    _, W, A, B, *_ = draw()
    norms = dora.Norms()
    first = dora.row_norms(W, A, B, 1.0, norms)
    kept = norms.held
    assert torch.equal(dora.row_norms(W, A, B, 1.0, norms), first) and norms.held is kept
    W.mul_(2.0)
    torch.testing.assert_close(dora.row_norms(W, A, B, 1.0, norms), dora.row_norms(W, A, B, 1.0))
    other = W.clone()
    dora.row_norms(other, A, B, 1.0, norms)
    assert norms.held[0]() is other


def test_a_norm_of_zero_is_zero_and_no_nan():
    W = torch.randn(3, 8)
    assert not dora.row_norms(W, W[:3].clone(), -torch.eye(3), 1.0).isnan().any()


def test_peak_memory_over_plain_lora_is_one_output():
    if not hasattr(torch._C._profiler, "_ExperimentalConfig"):
        pytest.skip("no memory profile")
    M, N, K = 512, 768, 256
    x, W, A, B, m, _, dy = draw(M, N, K)
    for t in (x, A, B, m):
        t.requires_grad_()
    norms = dora.Norms()
    dora.row_norms(W, A, B, 2.0, norms)

    def peak(function):
        from torch.profiler import ProfilerActivity, profile

        function().backward(dy)  # the gradients have their memory before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            function().backward(dy)
        total = most = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                most = max(most, total)
        return most

    plain = peak(lambda: fastlora.lora_linear(x, W, A, B, None, 2.0))
    more = peak(lambda: dora.dora_linear(x, W, A, B, None, 2.0, 0.0, True, m, norms))
    assert M * N * 4 <= more - plain <= 1.1 * M * N * 4 + 4 * dora._CHUNK["cpu"]


def layer(kind=fastlora.FusedLoRALinear, **options):
    torch.manual_seed(0)
    made = kind(24, 16, r=3, use_dora=True, **options)
    with torch.no_grad():
        made.lora_B.normal_()
        made.lora_magnitude_vector.mul_(1.1)
    return made


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))


def test_a_new_layer_computes_what_its_base_computes():
    base = torch.nn.Linear(24, 16)
    made = fastlora.FusedLoRALinear.from_linear(base, use_dora=True)
    torch.testing.assert_close(made(X), base(X))
    assert dict(made.named_parameters())["lora_magnitude_vector"].requires_grad and "use_dora=True" in repr(made)


def test_layer_is_the_reference_and_its_eager_twin():
    made = layer()
    want = reference.dora_linear(
        X, made.weight, made.lora_A, made.lora_B, made.lora_magnitude_vector, made.bias, made.scaling
    )
    torch.testing.assert_close(made(X), want)
    torch.testing.assert_close(layer(EagerLoRALinear)(X), want)


def test_merge_and_back():
    made = layer()
    want, before = made(X), made.weight
    made.merge()
    torch.testing.assert_close(made(X), want)
    made.unmerge()
    assert made.weight is before
    torch.testing.assert_close(made(X), want)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_state_dicts(how):
    made = layer()
    want = made(X)
    torch.testing.assert_close(how(made)(X), want)
    other = fastlora.FusedLoRALinear(24, 16, r=3, use_dora=True)
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(X), want)


def test_function_transforms_run_the_reference():
    made = layer()
    with pytest.warns(UserWarning, match="function transform"):
        got = torch.func.vmap(made)(X)
    torch.testing.assert_close(got, made(X))


def test_batches_of_gradients_and_second_derivatives():
    tensors = draw(5, 6, 12, 2, torch.float64)
    x, W, A, B, m, bias, dy = (t.requires_grad_() if i in (0, 2, 3, 4) else t for i, t in enumerate(tensors))
    dys = torch.stack([dy, dy.sin()])
    found = []
    for function in (ours, reference.dora_linear):
        y = function(x, W, A, B, m, bias, 2.0)
        batch = torch.autograd.grad(y, [x, A, B, m], dys, is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad(y.square().sum(), [x, A, B, m], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, A, B, m])
        found.append([*batch, *first, *second])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled():
    torch._dynamo.reset()
    made = layer(lora_dropout=0.0)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    got, want = compiled(X), made(X)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), [made.lora_A, made.lora_magnitude_vector]) for y in (got, want)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_inject_trains_the_magnitudes():
    model = fastlora.inject(torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 24)), use_dora=True, r=2)
    model(X).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{i}.{name}" for i in (0, 1) for name in ("lora_A", "lora_B", "lora_magnitude_vector")}
    assert model.fastlora_config.use_dora
