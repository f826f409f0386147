"""The autograd node, in C++ and in Python: its gradients, theirs, and what is kept for backward."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import accuracy
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastlora

pytestmark = pytest.mark.usefixtures("either_node")


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


@pytest.mark.parametrize(("dtype", "region"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_backward_inside_a_foreign_autocast_region_keeps_its_dtype(dtype, region):
    inputs = accuracy.draw(32, 24, 40, 4, dtype)
    plain = accuracy.run(fastlora.lora_linear, inputs)
    x, A, B, bias = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias))
    y = fastlora.lora_linear(x, inputs.weight, A, B, bias, inputs.scaling)
    with torch.autocast("cpu", dtype=region):
        y.backward(inputs.dy)
    for name, leaf in (("dX", x), ("dA", A), ("dB", B), ("dbias", bias)):
        assert torch.equal(leaf.grad, plain[name])


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


@pytest.mark.parametrize("narrowed", [lambda S: S[:7], lambda S: S[:, :2], lambda S: S.flatten()])
def test_an_S_that_hooks_have_narrowed_is_refused(narrowed, cpu_path):
    inputs = accuracy.draw(30, 12, 20, 4, torch.float32)
    A = inputs.lora_A.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: narrowed(t) if t.shape == (30, 4) else t):
        y = fastlora.lora_linear(inputs.x, inputs.weight, A, inputs.lora_B.clone().requires_grad_(), path=cpu_path)
        with pytest.raises(RuntimeError, match="S came back from saved-tensor hooks as" if cpu_path == "cpu" else ""):
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


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_one_gradient_alone_under_create_graph(dropout_p):
    """`autograd.grad` may ask for dB where lora_A learns too: what is kept is the same, and so is dB."""
    x, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((6, 5), (2, 5), (4, 2)))
    weight, dy = torch.randn(4, 5), torch.randn(6, 4)

    def gradient(wanted, create_graph):
        torch.manual_seed(3)
        y = fastlora.lora_linear(x, weight, A, B, None, 1.5, dropout_p)
        return torch.autograd.grad(y, [wanted], dy, create_graph=create_graph)[0]

    for wanted in (x, A, B):
        torch.testing.assert_close(gradient(wanted, True), gradient(wanted, False))
    (second,) = torch.autograd.grad(gradient(B, True).pow(2).sum(), [A])
    torch.manual_seed(3)
    both = torch.autograd.grad(
        fastlora.lora_linear(x, weight, A, B, None, 1.5, dropout_p), [A, B], dy, create_graph=True
    )
    torch.testing.assert_close(second, torch.autograd.grad(both[1].pow(2).sum(), [A])[0])
