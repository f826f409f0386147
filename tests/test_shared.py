"""Projections that share x: equal to `lora_linear` on each, in one node; and what computes each alone."""

from __future__ import annotations

from dataclasses import replace

import accuracy
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import autograd, reference, roofline, shared
from fastlora.accuracy import shared_violations
from fastlora.node import NODE
from fastlora.paths import PATHS
from fastlora.paths.problem import draw_seeds

SHAPES = ((53, 3), (41, 8), (72, 16))  # (N, R) of each
DTYPES = [
    *[(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(params=["C++", "Python"], autouse=True)
def _either_node(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(shared, "NODE", None)
        monkeypatch.setattr(autograd, "NODE", None)
    elif NODE is None:
        pytest.skip("the node in C++ was not compiled here")


def draw(dtype=torch.float32, adapter_dtype=None, p=0.0, path="cpu", shapes=SHAPES, lead=(37,), K=41):
    """Inputs of projections of one x: the second without a bias, scalings that differ, masks in the order drawn."""
    M = torch.Size(lead).numel()
    many = [
        accuracy.draw(M, N, K, R, dtype, adapter_dtype=adapter_dtype, bias=i != 1, scaling=1.0 + i, seed=i)
        for i, (N, R) in enumerate(shapes)
    ]
    x = many[0].x.view(*lead, K)
    many = [replace(one, x=x, dy=one.dy.view(*lead, -1), dropout_p=p) for one in many]
    if p:
        torch.manual_seed(0)
        masks = [PATHS[path].mask(seed, M, K, p) for seed in draw_seeds(x.device, len(many))]
        many = [replace(one, mask=mask.view(x.shape)) for one, mask in zip(many, masks, strict=True)]
    torch.manual_seed(0)
    return many


def arguments(many, asks=True):
    """x and the projections, as fresh leaves."""
    x = many[0].x.clone().requires_grad_(asks)
    parts = [(one.lora_A, one.lora_B, one.bias) for one in many]
    parts = [[None if t is None else t.clone().requires_grad_(asks) for t in one] for one in parts]
    return x, [(one.weight, *leaf, one.scaling) for one, leaf in zip(many, parts, strict=True)]


def leaves(x, projections):
    return [x, *(t for one in projections for t in one[1:4] if t is not None)]


def each_alone(x, projections, p=0.0):
    return [fastlora.lora_linear(x, *one, p) for one in projections]


@pytest.mark.parametrize("path", ["torch", "cpu"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("shapes", "lead"), [(SHAPES, (37,)), (((40, 4), (24, 4)), (3, 1, 5)), ((*SHAPES, (24, 4)), (9,))]
)
def test_each_is_right_by_the_error_rule(path, dtype, adapter_dtype, p, shapes, lead, monkeypatch, cpu_path):
    monkeypatch.setenv("FASTLORA_PATH", "torch" if cpu_path == "torch" else path)
    many = draw(dtype, adapter_dtype, p, path, shapes, lead)
    assert not shared_violations(fastlora.lora_linears, many)


def test_it_is_one_node():
    x, projections = arguments(draw())
    ys = fastlora.lora_linears(x, projections)
    assert len({y.grad_fn for y in ys}) == 1
    assert not any(y._is_view() for y in ys)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_outputs_and_masks_are_those_of_each_alone(p):
    x, projections = arguments(draw())
    torch.manual_seed(5)
    alone = each_alone(x, projections, p)
    torch.manual_seed(5)
    for y, own in zip(fastlora.lora_linears(x, projections, p), alone, strict=True):
        assert torch.equal(y, own)
    torch.manual_seed(5)
    with torch.no_grad():
        ys = fastlora.lora_linears(x, projections, p)
    assert all(torch.equal(y, own) for y, own in zip(ys, alone, strict=True)) and not ys[0].requires_grad


def test_dropout_is_off_where_it_does_not_train():
    x, projections = arguments(draw())
    ys = fastlora.lora_linears(x, projections, 0.5, training=False)
    assert all(torch.equal(a, b) for a, b in zip(ys, each_alone(x, projections), strict=True))


def test_x_is_kept_once():
    x, projections = arguments(draw())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastlora.lora_linears(x, projections, 0.5)
    own = {t.data_ptr() for one in projections for t in one[:3]}
    extra = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in own)
    assert extra == [(), (), (), (37, 3), (37, 8), (37, 16), (37, 41)]


@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_gradients_only_where_asked(path, monkeypatch, cpu_path):
    monkeypatch.setenv("FASTLORA_PATH", "torch" if cpu_path == "torch" else path)
    many = draw()
    x, projections = arguments(many)
    all_of_them = torch.autograd.grad(each_alone(x, projections), leaves(x, projections), [one.dy for one in many])
    for i in range(len(all_of_them)):
        x, projections = arguments(many, asks=False)
        x.requires_grad_()
        wanted = leaves(x, projections)[i].requires_grad_()
        ys = fastlora.lora_linears(x, projections)
        torch.autograd.backward(ys, [one.dy for one in many])
        assert len({y.grad_fn for y in ys}) == 1
        torch.testing.assert_close(wanted.grad, all_of_them[i])
        torch.testing.assert_close(x.grad, all_of_them[0])
        assert all(t.grad is None for t in leaves(x, projections)[1:] if t is not wanted)


def test_what_asks_for_no_gradient_gets_none():
    x, projections = arguments(draw(), asks=False)
    projections[1][1].requires_grad_()
    assert [y.requires_grad for y in fastlora.lora_linears(x, projections)] == [False, True, False]


def test_biases_that_learn_and_one_that_does_no_more():
    x, projections = arguments(draw(shapes=SHAPES[:1] * 3), asks=False)
    projections = projections[::2]  # those with a bias
    for _, _, _, bias, _ in projections:
        bias.requires_grad_()
    assert [y.requires_grad for y in fastlora.lora_linears(x, projections)] == [True, True]
    projections[0][3].requires_grad_(False)
    assert [y.requires_grad for y in fastlora.lora_linears(x, projections)] == [False, True]


@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)])
def test_an_output_may_take_no_part(used):
    many = draw()
    x, projections = arguments(many)
    found = fastlora.lora_linears(x, projections)
    got = torch.autograd.grad(sum(found[i].square().sum() for i in used), leaves(x, projections), allow_unused=True)
    alone = each_alone(x, projections)
    want = torch.autograd.grad(sum(alone[i].square().sum() for i in used), leaves(x, projections), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["none", "A of one", "all A", "x"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_can_be_differentiated_again(frozen, p):
    many = draw()

    def second(function):
        x, projections = arguments(many)
        torch.manual_seed(1)
        if frozen == "x":
            x.requires_grad_(False)
        for one in projections[: {"A of one": 1, "all A": 3}.get(frozen, 0)]:
            one[1].requires_grad_(False)
        ends = [t for t in leaves(x, projections) if t.requires_grad]
        first = torch.autograd.grad(function(x, projections, p), ends, [one.dy for one in many], create_graph=True)
        total = sum((g * g).sum() for g in first if g.requires_grad)
        return [*first, *torch.autograd.grad(total, ends, allow_unused=True)]

    for a, b in zip(second(fastlora.lora_linears), second(each_alone), strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [(2,), (2, 4), (1, 5)])  # of x, A, B, bias, A, B, A, B, bias
@pytest.mark.parametrize("frozen", ["none", "A of one", "x"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_part_of_the_gradients_can_be_differentiated_again(asked, frozen, p):
    many = draw(p=p)

    def of_the_reference(x, projections, p):
        masks = [one.mask for one in many]
        return [reference.lora_linear(x, *one, p, mask=mask) for one, mask in zip(projections, masks, strict=True)]

    def second(function):
        x, projections = arguments(many)
        torch.manual_seed(0)
        x.requires_grad_(frozen != "x")
        if frozen == "A of one":
            projections[2][1].requires_grad_(False)
        all_of_them = leaves(x, projections)
        ends, ys = [all_of_them[i] for i in asked], function(x, projections, p)
        first = torch.autograd.grad(ys, ends, [one.dy for one in many], create_graph=True)
        learn = [t for t in all_of_them if t.requires_grad]
        return [*first, *torch.autograd.grad(sum((g * g).sum() for g in first), learn, allow_unused=True)]

    for a, b in zip(second(fastlora.lora_linears), second(of_the_reference), strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            # sums that cancel are as far off as their terms are large
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_the_masks(reentrant):
    many = draw()
    x, projections = arguments(many)

    def run(x):
        return sum(y.square().sum() for y in fastlora.lora_linears(x, projections, 0.4))

    torch.manual_seed(2)
    plain = torch.autograd.grad(run(x), leaves(x, projections))
    torch.manual_seed(2)
    checkpoint(run, x, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, leaves(x, projections), strict=True))


def test_under_autocast_it_is_as_each_alone():
    x, projections = arguments(draw())
    with torch.autocast("cpu", torch.bfloat16):
        ys, alone = fastlora.lora_linears(x, projections), each_alone(x, projections)
    assert all(a.dtype is torch.bfloat16 and torch.equal(a, b) for a, b in zip(ys, alone, strict=True))


@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_backward_inside_a_foreign_autocast_region_keeps_its_dtype(path, monkeypatch, cpu_path):
    monkeypatch.setenv("FASTLORA_PATH", "torch" if cpu_path == "torch" else path)
    many = draw()
    found = []
    for dtype in (None, torch.bfloat16):
        x, projections = arguments(many)
        ys = fastlora.lora_linears(x, projections)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found.append(torch.autograd.grad(ys, leaves(x, projections), [one.dy for one in many]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_tensors_on_two_devices_are_not_computed_together():
    x, projections = arguments(draw())
    assert shared.path_for(x, projections, 0.0) is not None
    projections[1] = (projections[1][0].to("meta"), *projections[1][1:])
    assert shared.path_for(x, projections, 0.0) is None


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize("what", ["vmap", "jvp", "subclass", "packed", "float64 adapters", "trainable weight", "one"])
def test_what_is_out_of_the_ordinary_is_computed_one_by_one(what, monkeypatch):
    x, projections = arguments(draw(), asks=False)
    if what == "subclass":
        x = x.as_subclass(Wrapped)
    if what == "float64 adapters":
        projections = [(w, A.double(), B.double(), bias, s) for w, A, B, bias, s in projections]
    if what == "trainable weight":
        projections[0][0].requires_grad_()
        for one in projections:
            one[1].requires_grad_()
    if what == "one":
        projections = projections[:1]
    if what == "packed":
        from fastlora.base_layer import packed_of

        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(64, 32, bias=False)
        layer = bnb.nn.Linear4bit.to(layer, "cpu")
        x = torch.randn(5, 64)
        projections = [(packed_of(layer, torch.float32), torch.randn(2, 64), torch.randn(32, 2), None, 1.0)] * 2
    called = []
    monkeypatch.setattr(shared, "lora_linear", lambda *a: called.append(1) or fastlora.lora_linear(*a))

    def run(x):
        return fastlora.lora_linears(x, projections)

    if what == "vmap":
        found, x = torch.vmap(run)(x.expand(2, *x.shape)), x.expand(2, *x.shape)
    elif what == "jvp":
        with forward_ad.dual_level():
            found = [forward_ad.unpack_dual(y).primal for y in run(forward_ad.make_dual(x, x))]
    else:
        found = run(x)
    for y, own in zip(found, each_alone(x, projections), strict=True):
        torch.testing.assert_close(y, own)
    assert len(called) == len(projections)


@pytest.mark.parametrize("how", ["whole numbers", "lists", "five"])
def test_the_node_takes_them_without_python(how, monkeypatch):
    if shared.NODE is None:
        pytest.skip("it is about the node in C++")
    x, projections = arguments(draw())
    want = each_alone(x, projections)
    if how == "whole numbers":
        projections = [(*one[:4], int(one[4])) for one in projections]
    if how == "lists":
        projections = [list(one) for one in projections]
    if how == "five":
        projections, want = [*projections, *projections[:2]], [*want, *want[:2]]
    fastlora.lora_linears(x, projections)  # chooses
    monkeypatch.setattr(shared, "path_for", None)
    found = fastlora.lora_linears(x, projections)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert len({y.grad_fn for y in found}) == (5 if how == "five" else 1)


def test_a_compiler_sees_each_alone():
    x, projections = arguments(draw())
    found = torch.compile(lambda x: fastlora.lora_linears(x, projections), backend="aot_eager", fullgraph=True)(x)
    for y, own in zip(found, each_alone(x, projections), strict=True):
        torch.testing.assert_close(y, own)


def test_a_wrong_argument_is_named():
    x, projections = arguments(draw())
    projections[2] = (projections[2][0], projections[2][1], projections[1][2], None, 1.0)
    with pytest.raises(ValueError, match="lora_B has shape"):
        fastlora.lora_linears(x, projections)


def test_results_are_repeatable_to_the_bit():
    def run():
        many = draw(lead=(300,))
        x, projections = arguments(many)
        ys = fastlora.lora_linears(x, projections, 0.3)
        return [*ys, *torch.autograd.grad(ys, leaves(x, projections), [one.dy for one in many])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_example_of_the_docstring_runs():
    text = shared.__doc__
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    names: dict = {}
    exec(code, names)
    assert [t.shape[-1] for t in (names["q"], names["k"], names["v"])] == [64, 32, 32]


@pytest.mark.parametrize(
    ("path", "dropout", "shapes", "most"),
    [
        ("hybrid", True, (4096, 1024, 1024), 0.64),  # Llama-3 8B
        ("split", True, (4096, 1024, 1024), 0.59),
        ("onepass", True, (4096, 1024, 1024), 0.58),
        ("torch", False, (4096, 1024, 1024), 0.66),
        ("hybrid", True, (4096, 4096, 4096), 0.72),
        ("split", True, (4096, 4096, 4096), 0.67),
        ("onepass", True, (4096, 4096, 4096), 0.67),
        ("torch", True, (4096, 4096, 4096), 0.95),  # there each mask is a pass of its own
    ],
)
def test_the_model_says_what_is_not_moved_twice(path, dropout, shapes, most):
    many = [roofline.Work(8192, N, 4096, 16, 2, dropout) for N in shapes]
    ratio = roofline.moved(roofline.together(path, many)) / roofline.moved(roofline.apart(path, many))
    assert most - 0.02 < ratio < most


def test_the_model_gives_the_sum_of_products_the_tiles_of_one():
    many = [roofline.Work(960, 768, 768, 16, 2, False)] * 3
    assert roofline.together("split", many)[-1].tiles == roofline.split(many[0])[1][-1].tiles > 0


@pytest.mark.parametrize("one", [(torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), None), {"weight": 1}])
def test_a_projection_that_lacks_its_scaling_is_refused(one):
    with pytest.raises(TypeError, match=r"a projection is (4 values|dict); it needs to be"):
        fastlora.lora_linears(torch.ones(2, 3), [one, one], 0.1)
