"""`lora_linear` on the CPU: the error rule, dropout, scalings, autocast, and what is said of a wrong argument."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import accuracy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlora

pytestmark = pytest.mark.usefixtures("either_node")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 3, 16, 33, 128])
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


@settings(max_examples=60, deadline=None)
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
@pytest.mark.parametrize("path", [None, "torch"])
@pytest.mark.parametrize("scaling", [0.0, 1e-50])  # the latter is 0 in float32 alone
def test_a_scaling_of_zero_hides_no_nan(name, x_asks, path, scaling):
    inputs = accuracy.draw(3, 5, 6, 2, torch.float32)
    getattr(inputs, name).view(-1)[0] = float("nan")
    inputs.x.requires_grad_(x_asks)
    arguments = (inputs.x, inputs.weight, inputs.lora_A.requires_grad_(), inputs.lora_B, inputs.bias, scaling)
    y, expected = fastlora.lora_linear(*arguments, path=path), fastlora.reference.lora_linear(*arguments)
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


def test_scaling_as_a_tensor():
    inputs = accuracy.draw(8, 5, 6, 2, torch.float32)
    for scaling in (torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)):
        got = accuracy.run(fastlora.lora_linear, replace(inputs, scaling=scaling))
        assert not accuracy.violations(got, replace(inputs, scaling=0.5))


def test_no_gradient_flows_to_the_scaling():
    inputs, scaling = accuracy.draw(8, 5, 6, 2, torch.float32), torch.tensor(0.5, requires_grad=True)
    lora_B = inputs.lora_B.requires_grad_()
    fastlora.lora_linear(inputs.x, inputs.weight, inputs.lora_A, lora_B, scaling=scaling).sum().backward()
    assert scaling.grad is None and lora_B.grad is not None


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
