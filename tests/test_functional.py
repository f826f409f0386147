"""`lora_linear` on the CPU: the error rule, autograd, dropout, and what is kept for backward."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from functools import partial

import accuracy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.paths import mask as masks

pytestmark = pytest.mark.usefixtures("either_node")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 2, 3, 8, 16, 33, 64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_error_rule(poisoned, dtype, R, dropout_p):
    inputs = accuracy.draw(37, 53, 71, R, dtype, seed=R)
    if dropout_p:
        inputs = accuracy.with_mask(inputs, dropout_p, seed=R)
    accuracy.check(fastlora.lora_linear, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_over_a_16_bit_base(dtype):
    inputs = accuracy.draw(64, 48, 40, 8, dtype, adapter_dtype=torch.float32)
    got = accuracy.check(fastlora.lora_linear, inputs)
    assert got["dA"].dtype is got["dB"].dtype is torch.float32
    assert got["Y"].dtype is dtype


def test_float64_adapters_keep_their_range_over_a_narrower_base():
    inputs = accuracy.draw(6, 70, 70, 2, torch.float32, adapter_dtype=torch.float64, scaling=1e30)
    got = accuracy.check(fastlora.lora_linear, replace(inputs, lora_B=inputs.lora_B * 1e8))
    assert got["dA"].isfinite().all() and got["dA"].max() > torch.finfo(torch.float32).max


@settings(max_examples=150, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    R=st.integers(1, 20),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    bias=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "expanded", "sliced", "stepped"]),
    scaling=st.sampled_from([1.0, 0.0, -2.5, 16.0]),
)
def test_any_shape_stride_and_dtype(lead, N, K, R, dtype, bias, layout, scaling):
    inputs = accuracy.draw(torch.Size(lead).numel(), N, K, R, dtype, bias=bias, scaling=scaling)
    x = inputs.x.view(*lead, K)
    if layout == "transposed" and len(lead) >= 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded" and len(lead) >= 1 and lead[0]:
        x = x[:1].expand(*lead, K)
    elif layout == "sliced":
        x = torch.cat([x, x], -1)[..., K // 2 : K // 2 + K]
    elif layout == "stepped":
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    # `run` makes leaves by detach, which keeps the strides
    accuracy.check(fastlora.lora_linear, replace(inputs, x=x, dy=inputs.dy.view(*lead, N)))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize(("N", "K"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_nothing_to_multiply(lead, N, K, dropout_p):
    inputs = accuracy.draw(torch.Size(lead).numel(), N, max(K, 1), 2, torch.float32)
    x, weight, lora_A = inputs.x[:, :K], inputs.weight[:, :K], inputs.lora_A[:, :K]
    inputs = replace(inputs, x=x.reshape(*lead, K), weight=weight, lora_A=lora_A, dy=inputs.dy.reshape(*lead, N))
    mask = torch.ones(inputs.x.shape, dtype=torch.bool)
    inputs = replace(inputs, dropout_p=dropout_p, mask=mask if K == 0 else None)
    if K == 0 or not dropout_p:
        accuracy.check(fastlora.lora_linear, inputs)
    assert fastlora.lora_linear(inputs.x, weight, lora_A, inputs.lora_B).shape == (*lead, N)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("x_asks", [False, True])
def test_a_scaling_of_zero_hides_no_nan(name, x_asks):
    inputs = accuracy.draw(3, 5, 6, 2, torch.float32)
    getattr(inputs, name).view(-1)[0] = float("nan")
    inputs.x.requires_grad_(x_asks)
    arguments = (inputs.x, inputs.weight, inputs.lora_A.requires_grad_(), inputs.lora_B, inputs.bias, 0.0)
    y, expected = fastlora.lora_linear(*arguments), fastlora.reference.lora_linear(*arguments)
    assert expected.isnan().any() and torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize(("scaling", "dy", "lora_B"), [(1000.0, 1e-3, 1e-3), (0.01, 1e4, 1.0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_float16_keeps_the_range_that_eager_has(scaling, dy, lora_B, dropout_p):
    inputs = accuracy.draw(8, 200, 10, 4, torch.float16, scaling=scaling)
    inputs = replace(inputs, dy=inputs.dy * dy, lora_B=inputs.lora_B * lora_B)
    accuracy.check(fastlora.lora_linear, accuracy.with_mask(inputs, dropout_p, seed=1) if dropout_p else inputs)


def test_the_rule_takes_what_eager_loses_to_overflow():
    ones = torch.ones(1, 1, dtype=torch.float16)
    inputs = accuracy.Inputs(ones, ones * 6e4, ones, ones * 3e4, None, ones, scaling=1.0)
    eager = accuracy.run(fastlora.reference.lora_linear, inputs)
    assert eager["Y"].isposinf() and not accuracy.violations(eager, inputs)
    for wrong in (float("nan"), float("-inf"), 1.0):
        assert accuracy.violations({"Y": torch.full_like(ones, wrong)}, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_in_float64(dropout_p):
    inputs = accuracy.draw(5, 4, 6, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)]

    def function(x, lora_A, lora_B, bias):
        torch.manual_seed(3)  # one mask for all the evaluations
        return fastlora.lora_linear(x, inputs.weight, lora_A, lora_B, bias, 0.7, dropout_p)

    assert torch.autograd.gradcheck(function, leaves)


def test_keeps_only_x_and_S():
    inputs = accuracy.draw(32, 24, 40, 4, torch.float32)
    x = inputs.x.requires_grad_()
    A, B = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()
    for dropout_p in (0.0, 0.5):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            fastlora.lora_linear(x, inputs.weight, A, B, inputs.bias, 2.0, dropout_p)
        own = {t.data_ptr() for t in (x, inputs.weight, A, B)}
        extra = [t for t in kept if t.data_ptr() not in own]
        sizes = sorted(tuple(t.shape) for t in extra)
        assert sizes == ([(), (32, 4)] if dropout_p else [(32, 4)])
        assert x.data_ptr() in {t.data_ptr() for t in kept}


def test_gradients_only_where_asked():
    inputs = accuracy.draw(8, 5, 6, 2, torch.float32)
    for wanted in ("x", "lora_A", "lora_B", "bias"):
        tensors = {n: getattr(inputs, n).clone() for n in ("x", "lora_A", "lora_B", "bias")}
        tensors[wanted].requires_grad_()
        y = fastlora.lora_linear(tensors["x"], inputs.weight, tensors["lora_A"], tensors["lora_B"], tensors["bias"])
        y.backward(inputs.dy)
        assert [n for n, t in tensors.items() if t.grad is not None] == [wanted]
        expected = accuracy.run(fastlora.reference.lora_linear, replace(inputs, scaling=1.0))
        name = {"x": "dX", "lora_A": "dA", "lora_B": "dB", "bias": "dbias"}[wanted]
        torch.testing.assert_close(tensors[wanted].grad, expected[name])


def test_weight_gets_no_gradient_and_says_so():
    inputs = accuracy.draw(8, 5, 6, 2, torch.float32)
    weight = inputs.weight.requires_grad_()
    with pytest.warns(UserWarning, match="weight.requires_grad is True"):
        y = fastlora.lora_linear(inputs.x, weight, inputs.lora_A.requires_grad_(), inputs.lora_B)
    y.sum().backward()
    assert weight.grad is None and inputs.lora_A.grad is not None


def test_no_gradient_modes():
    inputs = accuracy.draw(8, 5, 6, 2, torch.float32)
    expected = fastlora.reference.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B)
    A = inputs.lora_A.requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = fastlora.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B)
        assert not y.requires_grad
        torch.testing.assert_close(y.clone(), expected)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
def test_output_is_no_view_and_takes_in_place_ops(shape):
    inputs = accuracy.draw(1, 5, 6, 2, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    y = fastlora.lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias)
    assert y.shape == (*shape[:-1], 5) and not y._is_view()
    y.mul_(2).add_(1)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("path", ["cpu", "torch"])
@pytest.mark.parametrize("asks", ["xAB", "AB", "xB", "xA", "x", "A", "B"])
@pytest.mark.parametrize(("dropout_p", "dy_asks"), [(0.0, False), (0.0, True), (0.4, True)])
def test_gradients_can_be_differentiated_again(path, asks, dropout_p, dy_asks, cpu_path):
    inputs = accuracy.draw(9, 7, 8, 2, torch.float32)
    path = "torch" if cpu_path == "torch" else path
    inputs = accuracy.with_mask(inputs, dropout_p, seed=1, path=path) if dropout_p else inputs

    def second(function, **keywords):
        named = zip("xAB", (inputs.x, inputs.lora_A, inputs.lora_B), strict=True)
        x, A, B = (t.clone().requires_grad_(n in asks) for n, t in named)
        dy = inputs.dy.clone().requires_grad_(dy_asks)
        torch.manual_seed(1)
        y = function(x, inputs.weight, A, B, inputs.bias, 2.0, dropout_p, **keywords)
        leaves = [t for t in (x, A, B) if t.requires_grad]
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        ends = [*leaves, dy] if dy_asks else leaves
        if not any(g.requires_grad for g in first):
            return [*first, *(None for _ in ends)]
        total = sum((g * g).sum() for g in first if g.requires_grad)
        return [*first, *torch.autograd.grad(total, ends, allow_unused=True)]

    ours = second(fastlora.lora_linear, path=path)
    for mine, eager in zip(ours, second(fastlora.reference.lora_linear, mask=inputs.mask), strict=True):
        if eager is None or mine is None:  # a zero may be said either way
            assert mine is eager or not (eager if mine is None else mine).any()
        else:
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("path", ["cpu", "torch"])
def test_a_batch_of_gradients_can_be_differentiated_again(path, cpu_path):
    inputs = accuracy.draw(9, 7, 8, 2, torch.float32)
    path = "torch" if cpu_path == "torch" else path
    found = []
    for function in (partial(fastlora.lora_linear, path=path), fastlora.reference.lora_linear):
        x, A, B = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
        y = function(x, inputs.weight, A, B)
        batch = torch.stack([inputs.dy, -inputs.dy])
        first = torch.autograd.grad(y, (x, A, B), batch, is_grads_batched=True, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum((g * g).sum() for g in first), (x, A, B))])
    for mine, eager in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-3)


def test_a_frozen_lora_A_keeps_no_x():
    inputs = accuracy.draw(64, 24, 40, 4, torch.float32)
    x, B, kept = inputs.x.requires_grad_(), inputs.lora_B.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastlora.lora_linear(x, inputs.weight, inputs.lora_A, B)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    assert max(t.untyped_storage().nbytes() for t in kept if t.shape == x.shape) == 4


def test_gradients_accumulate_and_graphs_are_retained():
    inputs = accuracy.draw(4, 5, 6, 2, torch.float32)
    A = inputs.lora_A.requires_grad_()
    y = fastlora.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B)
    y.backward(inputs.dy, retain_graph=True)
    once = A.grad.clone()
    y.backward(inputs.dy)
    torch.testing.assert_close(A.grad, 2 * once)


def test_dropout_obeys_the_generator_and_differs_between_calls():
    inputs = accuracy.draw(16, 12, 20, 4, torch.float32)
    args = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, None, 2.0, 0.5)
    torch.manual_seed(7)
    first, second = fastlora.lora_linear(*args), fastlora.lora_linear(*args)
    torch.manual_seed(7)
    again = fastlora.lora_linear(*args)
    assert torch.equal(first, again) and not torch.equal(first, second)
    off = fastlora.lora_linear(*args, training=False)
    assert torch.equal(off, fastlora.lora_linear(*args[:6]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_the_same_mask(reentrant):
    inputs = accuracy.draw(16, 12, 20, 4, torch.float32)
    A, x = inputs.lora_A.requires_grad_(), inputs.x.requires_grad_()

    def layer(x):
        return fastlora.lora_linear(x, inputs.weight, A, inputs.lora_B, None, 2.0, 0.5)

    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        A.grad = x.grad = None
        torch.manual_seed(11)
        call(x).backward(inputs.dy)
        grads.append((A.grad, x.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_statistics(p):
    keep = masks.keep_mask(torch.tensor(12345), 1000, 1000, p, torch.float32)
    kept = 65536 - round(p * 65536)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    sigma = (p * (1 - p) / 1e6) ** 0.5
    assert abs(keep.mean().item() - kept / 65536) < 5 * sigma
    for axis in (0, 1):  # no row or column stands out: 5 sigma over 1000 of them
        assert (keep.mean(axis) - kept / 65536).abs().max().item() < 5.5 * (p * (1 - p) / 1000) ** 0.5


@pytest.mark.parametrize("p", [0.0, 1e-6, 1.0])
def test_dropout_at_its_ends(p):
    inputs = replace(accuracy.draw(6, 5, 7, 2, torch.float32), dropout_p=p)
    torch.manual_seed(0)
    got = accuracy.run(fastlora.lora_linear, inputs)
    mask = torch.full((6, 7), p < 1)
    assert not accuracy.violations(
        got, replace(inputs, mask=mask) if p < 1 else replace(inputs, mask=mask, dropout_p=0)
    )


@pytest.mark.parametrize("path", [None, "torch"])
def test_dropout_just_below_one_drops_everything(path):
    inputs = accuracy.draw(6, 5, 7, 2, torch.float32)
    y = fastlora.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, dropout_p=1 - 1e-6, path=path)
    torch.testing.assert_close(y, torch.nn.functional.linear(inputs.x, inputs.weight))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(adapter_dtype):
    inputs = accuracy.draw(32, 24, 40, 4, torch.float32)
    x, A, B = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastlora.lora_linear(x, inputs.weight, A, B, inputs.bias, 2.0)
        assert y.dtype is torch.bfloat16
        y.backward(inputs.dy.bfloat16())  # inside the region: backward must not be cast again
    assert x.grad.dtype is A.grad.dtype is B.grad.dtype is torch.float32
    low = inputs.map(torch.Tensor.bfloat16)
    low = replace(low, lora_A=inputs.lora_A, lora_B=inputs.lora_B)
    got = {"Y": y.detach(), "dX": x.grad.bfloat16(), "dA": A.grad, "dB": B.grad}
    assert not accuracy.violations(got, low)


def test_backward_inside_a_foreign_autocast_region_keeps_float32():
    inputs = accuracy.draw(32, 24, 40, 4, torch.float32)
    plain = accuracy.run(fastlora.lora_linear, inputs)
    x = inputs.x.clone().requires_grad_()
    y = fastlora.lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, inputs.scaling)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(inputs.dy)
    assert torch.equal(x.grad, plain["dX"])


def test_scaling_as_a_tensor():
    inputs = accuracy.draw(8, 5, 6, 2, torch.float32)
    for scaling in (torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)):
        got = accuracy.run(fastlora.lora_linear, replace(inputs, scaling=scaling))
        assert not accuracy.violations(got, replace(inputs, scaling=0.5))


def test_a_scaling_beyond_16_bits_leaves_a_zero_update_zero():
    inputs = accuracy.draw(8, 5, 6, 2, torch.float16)
    y = fastlora.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B * 0, scaling=torch.tensor(1e5))
    assert torch.equal(y, torch.nn.functional.linear(inputs.x, inputs.weight))


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(0), "2", None, np.array(2.0), Decimal(2)])
def test_a_wrong_scaling_is_named(wrong):
    inputs = accuracy.draw(8, 2, 6, 2, torch.float32)
    with pytest.raises((TypeError, ValueError), match=r"^scaling "):
        fastlora.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, scaling=wrong)


@pytest.mark.parametrize("path", [None, "torch"])
@pytest.mark.parametrize("scaling", [1e-50, 1e39, -1e300, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_scaling_beyond_float32_is_eagers(path, scaling, dtype):
    inputs = replace(accuracy.draw(4, 3, 5, 2, dtype), scaling=scaling)
    ours = fastlora.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, scaling, path=path)
    eager = fastlora.reference.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, scaling)
    torch.testing.assert_close(ours, eager, equal_nan=True)


def test_results_repeat_bit_for_bit():
    inputs = accuracy.draw(200, 64, 96, 8, torch.float32)
    first, second = (accuracy.run(fastlora.lora_linear, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inf_and_nan_come_out_where_eager_puts_them():
    for value in (float("inf"), float("-inf"), float("nan")):
        inputs = accuracy.draw(6, 5, 7, 2, torch.float32)
        for tensor in ("x", "weight", "lora_A", "lora_B", "bias", "dy"):
            changed = replace(inputs, **{tensor: getattr(inputs, tensor).clone()})
            getattr(changed, tensor).view(-1)[3] = value
            accuracy.check(fastlora.lora_linear, changed)


def test_function_transforms_work():
    inputs = accuracy.draw(4, 5, 6, 2, torch.float32)

    def loss(A, x):
        return fastlora.lora_linear(x, inputs.weight, A, inputs.lora_B, None, 2.0).sum()

    with pytest.warns(UserWarning, match="function transform"):
        per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(inputs.lora_A, inputs.x)
    A = inputs.lora_A.requires_grad_()
    fastlora.reference.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B, None, 2.0).sum().backward()
    torch.testing.assert_close(per_row.sum(0), A.grad)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
@pytest.mark.filterwarnings("ignore:.*weight is frozen here")
def test_what_outlives_a_function_transform_is_a_tensor_again(name):
    left = []
    inputs = accuracy.draw(300, 96, 96, 4, torch.float32)

    def leak(t):
        left.append(t)
        return t.sum()

    torch.func.grad(leak)(getattr(inputs, name))
    tensors = {key: getattr(inputs, key) for key in ("x", "weight", "lora_A", "lora_B", "bias")}
    expected = fastlora.lora_linear(**tensors)
    leaked = tensors | {name: left[0]}
    with torch.no_grad():
        assert torch.equal(fastlora.lora_linear(**leaked), expected)
    trained = "lora_B" if name == "lora_A" else "lora_A"
    leaked[trained] = leaked[trained].clone().requires_grad_()
    y = fastlora.lora_linear(**leaked)
    y.sum().backward()
    assert torch.equal(y, expected) and leaked[trained].grad.isfinite().all()


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
@pytest.mark.filterwarnings("ignore:fastlora.lora_linear runs")
@pytest.mark.parametrize("shape", [(300, 96), (3, 100, 96)])
def test_forward_mode_differentiation_gives_the_tangent(name, shape):
    inputs = accuracy.draw(300, 96, 96, 4, torch.float32)
    tensors = {key: getattr(inputs, key) for key in ("x", "weight", "lora_A", "lora_B", "bias")}
    tensors["x"] = tensors["x"].view(shape)
    tangents = []
    for function in (fastlora.lora_linear, fastlora.reference.lora_linear):
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
            tangents.append(forward_ad.unpack_dual(function(**tensors | {name: dual})).tangent)
    torch.testing.assert_close(*tangents)


def test_a_gradient_that_outlived_a_function_transform_is_a_tensor_again():
    inputs, left = accuracy.draw(300, 96, 96, 4, torch.float32), []
    torch.func.grad(lambda t: left.append(t) or t.sum())(inputs.dy)
    grads = []
    for dy in (inputs.dy, left[0]):
        A = inputs.lora_A.clone().requires_grad_()
        fastlora.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B).backward(dy)
        grads.append(A.grad)
    assert torch.equal(*grads)


def test_saved_tensors_of_another_dtype_are_refused():
    inputs = accuracy.draw(300, 96, 96, 4, torch.float32)
    A = inputs.lora_A.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        y = fastlora.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B)
    with pytest.raises(RuntimeError, match=r"dtype|hooks"):
        y.sum().backward()


def test_a_seed_that_hooks_have_changed_is_refused():
    hashed = "cpu" if fastlora.paths()["cpu"] == "usable" else "torch"
    inputs = accuracy.draw(300, 96, 96, 4, torch.float32)
    A = inputs.lora_A.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        y = fastlora.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B, dropout_p=0.5, path=hashed)
    with pytest.raises(RuntimeError):
        y.sum().backward()


def test_a_dual_gradient_keeps_its_tangent():
    inputs = accuracy.draw(300, 96, 96, 4, torch.float32)
    tangents = []
    for function in (fastlora.lora_linear, fastlora.reference.lora_linear):
        A = inputs.lora_A.clone().requires_grad_()
        y = function(inputs.x, inputs.weight, A, inputs.lora_B, None, 1.0)
        with forward_ad.dual_level():
            (grad,) = torch.autograd.grad(y, A, forward_ad.make_dual(inputs.dy, torch.ones_like(inputs.dy)))
            tangents.append(forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": "text"}, TypeError, "x is str; it needs to be a Tensor"),
        ({"x": np.zeros((4, 6), np.float32)}, TypeError, "x is ndarray"),
        ({"lora_B": None}, TypeError, "lora_B is NoneType"),
        ({"bias": [0.0] * 5}, TypeError, "bias is list"),
        ({"x": torch.zeros(4, 7)}, ValueError, "x has shape (4, 7)"),
        ({"weight": torch.zeros(5)}, ValueError, "weight (5,)"),
        ({"lora_A": torch.zeros(2, 7)}, ValueError, "lora_A has shape (2, 7)"),
        ({"lora_A": torch.zeros(0, 6), "lora_B": torch.zeros(5, 0)}, ValueError, "R >= 1"),
        ({"lora_B": torch.zeros(2, 5)}, ValueError, "lora_B has shape (2, 5)"),
        ({"bias": torch.zeros(6)}, ValueError, "bias has shape (6,)"),
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "torch.int64"),
        ({"x": torch.zeros(4, 6, dtype=torch.bfloat16)}, TypeError, "weight is torch.float32"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"path": "fast"}, ValueError, "path is 'fast'"),
        ({"path": "cuda"}, RuntimeError, "path 'cuda' cannot run here"),
        ({"path": "split"}, RuntimeError, "TRITON_INTERPRET=1"),
    ],
)
def test_mistakes_are_named(change, error, words):
    arguments = {
        "x": torch.zeros(4, 6),
        "weight": torch.zeros(5, 6),
        "lora_A": torch.zeros(2, 6),
        "lora_B": torch.zeros(5, 2),
    }
    with pytest.raises(error) as caught:
        fastlora.lora_linear(**{**arguments, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize(("path", "error"), [("fast", ValueError), ("split", RuntimeError)])
def test_a_path_that_the_environment_names_wrongly_is_traced_to_it(monkeypatch, path, error):
    monkeypatch.setenv("FASTLORA_PATH", path)
    with pytest.raises(error, match="FASTLORA_PATH"):
        fastlora.lora_linear(torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(2, 6), torch.zeros(5, 2))


def test_the_registered_ops_check_what_they_are_given():
    """Kernels read addresses: who calls `torch.ops.fastlora` himself is told what is wrong, as by `lora_linear`."""
    inputs = accuracy.draw(6, 5, 7, 2, torch.float32)
    x, W, A, B, bias, dy = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, inputs.dy
    forward, backward = torch.ops.fastlora.forward, torch.ops.fastlora.backward
    _, S = forward(x, W, A, B, bias, 2.0, 0.0, None, "")
    with pytest.raises(ValueError, match="lora_B has shape"):
        forward(x, W, A, B[:4], bias, 2.0, 0.0, None, "")
    with pytest.raises(TypeError, match="lora_B is"):
        forward(x, W, A, B.bfloat16(), bias, 2.0, 0.0, None, "")
    with pytest.raises(ValueError, match="they need"):
        forward(x[:, :5], W, A, B, bias, 2.0, 0.0, None, "")
    rest = (2.0, 0.0, None, "", True, True, True)
    torch.testing.assert_close(backward(dy, x, W, A, B, S, *rest)[0], dy @ W + 2.0 * dy @ B @ A)
    for wrong in ((dy[:, :4], x, W, A, B, S), (dy, x, W, A, B, S[:3]), (dy, x, W, A, B, S.bfloat16())):
        with pytest.raises(RuntimeError, match="came back from saved-tensor hooks as"):
            backward(*wrong, *rest)
