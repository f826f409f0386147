"""Path `cpu`: the compiled kernels by the error rule, for every instruction set that this processor has."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import accuracy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastlora
from fastlora import autograd, check, choice, functional
from fastlora.paths import cpu
from fastlora.paths.problem import Problem

CPU = torch.device("cpu")
if cpu.why_not(CPU, None):
    pytest.skip(f"path 'cpu': {cpu.why_not(CPU, None)}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=cpu._cpu.instructions())
def instructions(request):
    cpu._cpu.use_instructions(request.param)
    yield request.param
    cpu._cpu.use_instructions(cpu._cpu.instructions()[0])


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 3, 8, 33, 128])  # one, pairs, and one, several or many whole tiles of ranks
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_error_rule(poisoned, instructions, dtype, adapter_dtype, R, dropout_p):
    inputs = accuracy.draw(61, 53, 71, R, dtype, adapter_dtype=adapter_dtype, seed=R)
    if dropout_p:
        inputs = accuracy.with_mask(inputs, dropout_p, seed=R, path="cpu")
    accuracy.check(fastlora.lora_linear, inputs, path="cpu")


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    R=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "expanded", "sliced", "stepped"]),
    dropout_p=st.sampled_from([0.0, 0.4]),
    isa=st.sampled_from(cpu._cpu.instructions()),
    threads=st.sampled_from([1, 2, 5, 17]),
)
def test_any_shape_stride_and_dtype(lead, N, K, R, dtype, layout, dropout_p, isa, threads):
    inputs = accuracy.draw(torch.Size(lead).numel(), N, K, R, dtype)
    x = inputs.x.view(*lead, K)
    if layout == "transposed" and len(lead) >= 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded" and len(lead) >= 1 and lead[0]:
        x = x[:1].expand(*lead, K)
    elif layout == "sliced":
        x = torch.cat([x, x], -1)[..., K // 2 : K // 2 + K]
    elif layout == "stepped":
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    inputs = replace(inputs, x=x, dy=inputs.dy.view(*lead, N))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        cpu._cpu.use_instructions(isa)
        if dropout_p:
            inputs = accuracy.with_mask(inputs, dropout_p, seed=1, path="cpu")
        accuracy.check(fastlora.lora_linear, inputs, path="cpu")
    finally:
        torch.set_num_threads(before)
        cpu._cpu.use_instructions(cpu._cpu.instructions()[0])


@pytest.mark.parametrize("threads", [1, 2, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_several_threads_share(instructions, dtype, threads):
    """More rows than a block, more columns than a small block takes, rows that no number divides."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for M, N, K, R in ((331, 130, 96, 8), (101, 96, 4200, 5)):
            inputs = accuracy.with_mask(accuracy.draw(M, N, K, R, dtype), 0.25, seed=2, path="cpu")
            first = accuracy.check(fastlora.lora_linear, inputs, path="cpu")
            torch.manual_seed(2)
            again = accuracy.run(fastlora.lora_linear, inputs, path="cpu")
            assert all(torch.equal(first[name], again[name]) for name in first)  # bitwise repeatable
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_a_tensors_rows_and_columns_is_read_or_written(instructions, dtype):
    """Blocks of rows end anywhere, also within a pair of them; what lies behind is NaN."""
    inputs = accuracy.draw(61, 64, 96, 5, dtype)

    def amid_nan(t):
        return torch.nn.functional.pad(t, (0, 32, 0, 1), value=float("nan"))[:-1, :-32]

    accuracy.check(fastlora.lora_linear, replace(inputs, x=amid_nan(inputs.x), dy=amid_nan(inputs.dy)), path="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_earlier_call_left_behind_is_not_read(instructions, dtype):
    """The kernels' memory stays for the next call; here with NaN in a row that only the first call has."""
    inputs = accuracy.draw(48, 64, 96, 5, dtype)
    nan = inputs.map(lambda t: torch.full_like(t, float("nan")))
    accuracy.run(fastlora.lora_linear, nan, path="cpu")
    accuracy.check(fastlora.lora_linear, replace(inputs, x=inputs.x[:47], dy=inputs.dy[:47]), path="cpu")


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_may_lie_anyhow(dtype):
    inputs = accuracy.draw(20, 12, 16, 3, dtype)
    laid = {name: getattr(inputs, name).t().contiguous().t() for name in ("lora_A", "lora_B", "dy")}
    accuracy.check(fastlora.lora_linear, replace(inputs, **laid), path="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_nan_that_rounding_would_carry_over_stays_one(instructions, name, dtype):
    """All ones in its fraction: rounded to bfloat16 as a number it would be a zero."""
    inputs = accuracy.draw(40, 53, 71, 19, dtype, adapter_dtype=torch.float32)
    changed = getattr(inputs, name).clone()
    changed.view(torch.int32)[2, 1] = 0x7FFFFFFF
    accuracy.check(fastlora.lora_linear, replace(inputs, **{name: changed}), path="cpu")


def through(x, bias, lora_A, lora_B):
    """Y of one row over a weight of zeros, by path `cpu`."""
    weight = torch.zeros(lora_B.shape[0], x.shape[1], dtype=x.dtype)
    return fastlora.lora_linear(x, weight, lora_A, lora_B, bias, path="cpu")


def test_every_float16_is_read_and_rounded_as_ieee_has_it(instructions):
    half, one = torch.arange(65536).to(torch.int16).view(torch.float16), torch.ones(1, 1)
    same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    lora_B = half[:, None].clone().requires_grad_()
    y = through(one, None, one.half(), lora_B)
    same(y, half.float()[None])
    same(through(one.half(), half, one.half(), torch.zeros_like(lora_B)), half[None])
    steps = torch.cat([half[:0x7C00].float(), torch.tensor([2.0**16, 2.0**17, 1e38, torch.inf])])
    ties = (steps[1:] + steps[:-1]) / 2  # to even; their neighbours are no ties
    wide = torch.cat([steps, ties, ties.nextafter(steps[1:]), ties.nextafter(steps[:-1]), torch.tensor([1e-45, 1e-30])])
    wide = torch.cat([wide, -wide, torch.tensor([-1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)])
    lora_B = torch.zeros(len(wide), 1, dtype=torch.float16, requires_grad=True)
    through(one, None, one.half(), lora_B).backward(wide[None])
    same(lora_B.grad[:, 0], wide.half())


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("needs", ["x", "A", "B", "xA", "xB", "AB"])
def test_each_gradient_alone_is_the_same(needs):
    inputs = accuracy.with_mask(accuracy.draw(70, 40, 48, 4, torch.float32), 0.5, seed=3, path="cpu")
    every = accuracy.run(fastlora.lora_linear, inputs, path="cpu")
    leaves = {"x": inputs.x, "A": inputs.lora_A, "B": inputs.lora_B}
    asked = {name: t.detach().requires_grad_(name in needs) for name, t in leaves.items()}
    torch.manual_seed(3)
    y = fastlora.lora_linear(asked["x"], inputs.weight, asked["A"], asked["B"], inputs.bias, 2.0, 0.5, path="cpu")
    y.backward(inputs.dy)
    for name, t in asked.items():
        assert torch.equal(t.grad, every[f"d{name.upper()}"]) if name in needs else t.grad is None


def test_a_mask_is_a_function_of_seed_and_place_alone():
    seed, found = torch.tensor(12345), {}
    for isa in cpu._cpu.instructions():
        cpu._cpu.use_instructions(isa)
        found[isa] = cpu.mask(seed, 67, 101, 0.3)
    cpu._cpu.use_instructions(cpu._cpu.instructions()[0])
    first = next(iter(found.values()))
    assert all(torch.equal(mask, first) for mask in found.values())
    assert torch.equal(cpu.mask(seed, 12, 40, 0.3), first[:12, :40])
    assert not torch.equal(cpu.mask(seed + 1, 67, 101, 0.3), first)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_statistics(p):
    keep = cpu.mask(torch.tensor(987), 1024, 1024, p).double()
    share = 1 - round(p * 65536) / 65536
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - share) < 5 * sigma / 1024
    for axis in (0, 1):
        assert (keep.mean(axis) - share).abs().max().item() < 5.5 * sigma / 32
    centred = (keep - share) / sigma
    for rows, columns in ((0, 1), (0, 16), (0, 32), (1, 0), (48, 0), (1, 1), (1, 16)):  # neighbours know nothing
        product = centred[rows:, columns:] * centred[: 1024 - rows, : 1024 - columns]
        assert abs(product.mean().item()) < 5 / 1024, (rows, columns)
    other = (cpu.mask(torch.tensor(988), 1024, 1024, p).double() - share) / sigma
    assert abs((centred * other).mean().item()) < 5 / 1024  # nor does the mask of the next seed


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("p", [0.0, 1e-6, 1.0])
def test_dropout_at_its_ends(p):
    inputs = replace(accuracy.draw(6, 5, 7, 2, torch.float32), dropout_p=p)
    got = accuracy.run(fastlora.lora_linear, inputs, path="cpu")
    mask = torch.full((6, 7), p < 1)
    inputs = replace(inputs, mask=mask) if p < 1 else replace(inputs, mask=mask, dropout_p=0)
    assert not accuracy.violations(got, inputs)


def test_what_runs_on_a_cpu():
    def chosen(dtype, R, dropout):
        weight, lora_A = torch.empty(8, 8, dtype=dtype), torch.empty(R, 8, dtype=dtype)
        return choice.select(torch.empty(4, 8, dtype=dtype), weight, lora_A, dropout, None).name

    assert chosen(torch.float32, 16, 0.0) == chosen(torch.bfloat16, 64, 0.1) == "cpu"
    for dtype, rank in cpu.FAST_RANKS.items():
        assert chosen(dtype, rank, 0.0) == chosen(dtype, min(rank + 1, cpu.MAX_RANK), 0.1) == "cpu"
        assert chosen(dtype, rank + 1, 0.0) == "torch"
    assert chosen(torch.float64, 4, 0.0) == chosen(torch.float32, 129, 0.1) == "torch"


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        ("sys.modules['fastlora._cpu'] = None", "they were not compiled at install"),
        ("import torch, ctypes; ctypes.CDLL = lambda name: object()", "OpenMP threads were not found"),
    ],
)
def test_without_the_kernels_the_torch_path_runs(breaks, reason):
    program = f"""
import sys
{breaks}
import torch, fastlora
layer, x = fastlora.FusedLoRALinear(8, 6, r=2), torch.randn(3, 8, requires_grad=True)
layer(x).sum().backward()
print(fastlora.paths("cpu")["cpu"])
print(fastlora.explain(layer, x))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, explained = done.stdout.strip().splitlines()
    assert reason in said and explained.startswith("torch: ") and reason in explained
    assert f"path 'torch' runs on this CPU, not the faster 'cpu': {said}" in done.stderr


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_kernels_broken_on_purpose_are_found_and_not_used(monkeypatch, broken):
    """The check runs the road of eager calls: the node in C++ where there is one, else Python."""
    monkeypatch.setattr(check, "_verdicts", {})
    choice.forget()
    if autograd.NODE is None:
        position, honest = {"forward": 13, "backward": 18}[broken], getattr(cpu._cpu, broken)
        kernels = SimpleNamespace(**{name: getattr(cpu._cpu, name) for name in dir(cpu._cpu)})
        setattr(kernels, broken, lambda *a: honest(*a[:position], a[position] * 1.01, *a[position + 1 :]))
        monkeypatch.setattr(cpu, "_cpu", kernels)
    else:
        honest = autograd.NODE
        scaled = 1.01 if broken == "forward" else 1.0  # the node has no seam for the other

        class Broken:
            def __getattr__(self, name):
                return getattr(honest, name)

            def lora_linear(self, *arguments):
                y = honest.lora_linear(*arguments[:6], arguments[6] * scaled, arguments[7])
                if broken == "backward" and y is not None and y.requires_grad:
                    y.register_hook(lambda dy: dy * 1.01)
                return y

        monkeypatch.setattr(autograd, "NODE", Broken())
    layer, x = fastlora.FusedLoRALinear(8, 6, r=2), torch.randn(3, 8, requires_grad=True)
    with pytest.warns(fastlora.errors.FastLoRAWarning, match="path 'cpu' failed its self-check"):
        layer(x)
    assert fastlora.explain(layer, x).path == "torch"
    assert "over the limit" in fastlora.paths("cpu")["cpu"]
    with pytest.raises(RuntimeError, match="path 'cpu' cannot run here"):
        fastlora.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, path="cpu")
    choice.forget()


class Mine(torch.Tensor):
    pass


class Doubled(torch.Tensor):
    """A wrapper without memory of its own, as distributed tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(t):
            return t.inner if isinstance(t, cls) else t

        found = function(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs or {}))
        return pytree.tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, found)


def leaves(inputs):
    return [t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)]


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("path", ["cpu", "torch"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_gradient_without_memory_gives_what_a_plain_one_gives(dropout_p, path):
    inputs = accuracy.draw(7, 6, 5, 3, torch.float32)
    torch.manual_seed(1)
    x, A, B, bias = leaves(inputs)
    y = fastlora.lora_linear(x, inputs.weight, A, B, bias, 2.0, dropout_p, path=path)
    plain = torch.autograd.grad(y, (x, A, B, bias), inputs.dy, retain_graph=True)
    other = torch.autograd.grad(y, (x, A, B, bias), Doubled(inputs.dy), retain_graph=True)
    for expected, mine in zip(plain, other, strict=True):
        torch.testing.assert_close(mine.inner if isinstance(mine, Doubled) else mine, expected)
    if dropout_p and path == "torch":  # whose mask comes from a generator, which vmap forbids
        return
    batched = torch.autograd.grad(y, (x, A, B, bias), torch.stack([inputs.dy, -inputs.dy]), is_grads_batched=True)
    for expected, batch in zip(plain, batched, strict=True):
        torch.testing.assert_close(batch, torch.stack([expected, -expected]))


@pytest.mark.usefixtures("either_node")
def test_one_dtype_and_one_device_for_the_adapters():
    x, W = torch.randn(4, 8), torch.randn(6, 8)
    with pytest.raises(TypeError, match=r"lora_B is .*bfloat16 but lora_A is .*float32"):
        fastlora.lora_linear(x, W, torch.randn(2, 8), torch.randn(6, 2).bfloat16())
    with pytest.raises(RuntimeError, match="lora_A is on meta and x on cpu"):
        fastlora.lora_linear(x, W, torch.randn(2, 8, device="meta"), torch.randn(6, 2), path="cpu")
    with pytest.raises(RuntimeError, match="bias is on meta"):
        fastlora.lora_linear(x, W, torch.randn(2, 8), torch.randn(6, 2), torch.randn(6, device="meta"), path="cpu")


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_default_device_is_nobodys_business(monkeypatch, dropout_p):
    monkeypatch.setattr(check, "_verdicts", {})
    choice.forget()
    inputs = accuracy.with_mask(accuracy.draw(7, 6, 5, 3, torch.float32), dropout_p, seed=1, path="cpu")
    with torch.device("meta"):
        got = accuracy.run(fastlora.lora_linear, inputs)
    assert not accuracy.violations(got, inputs if dropout_p else replace(inputs, mask=None))


@pytest.mark.usefixtures("either_node")
def test_who_watches_atens_operations_sees_the_update():
    """Tracers, fake tensors and selective checkpointing; what writes into a tensor unseen would be lost or doubled."""
    inputs = accuracy.draw(7, 6, 5, 3, torch.float32)
    x, A, B, _ = leaves(inputs)
    arguments = (x, inputs.weight, A, B, inputs.bias, 2.0)
    expected = fastlora.reference.lora_linear(*arguments).detach()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen = [*getattr(self, "seen", []), str(function)]
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch() as watch:
        watched = fastlora.lora_linear(*arguments)
    torch.testing.assert_close(watched, expected)
    assert watch.seen == ["fastlora.forward.default"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        constants = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments[1:]]
        traced = torch.jit.trace(lambda x: fastlora.lora_linear(x, *constants), (x.detach(),))
        torch.testing.assert_close(traced(x), expected)
        made = make_fx(lambda x: fastlora.lora_linear(x, *arguments[1:]))(x.detach())
        torch.testing.assert_close(made(x), expected)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert fastlora.lora_linear(*arguments).shape == expected.shape

    plain = accuracy.run(fastlora.lora_linear, inputs)["dX"]
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default])
    y = checkpoint(lambda x: fastlora.lora_linear(x, *arguments[1:]), x, use_reentrant=False, context_fn=keep)
    (dx,) = torch.autograd.grad(y, x, inputs.dy)
    torch.testing.assert_close(dx, plain)


@pytest.mark.usefixtures("either_node")
def test_saved_tensors_may_come_back_with_other_strides_and_inputs_may_be_negative_views():
    inputs = accuracy.draw(7, 6, 5, 3, torch.float32)
    x, A, B, bias = leaves(inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.t().contiguous(), lambda t: t.t()):
        y = fastlora.lora_linear(x, inputs.weight, A, B, bias, 2.0, path="cpu")
    got = torch.autograd.grad(y, (x, A, B, bias), inputs.dy)
    names = ("dX", "dA", "dB", "dbias")
    assert not accuracy.violations({"Y": y.detach(), **dict(zip(names, got, strict=True))}, inputs)
    negative = replace(inputs, x=torch._neg_view(inputs.x), dy=torch._neg_view(inputs.dy))
    plain = replace(inputs, x=-inputs.x, dy=-inputs.dy)
    assert not accuracy.violations(accuracy.run(fastlora.lora_linear, negative, path="cpu"), plain)


def test_a_weight_that_hooks_have_narrowed_is_refused(either_node):
    """ATen's product would have the narrower shape, and the kernels add to it."""
    inputs = accuracy.draw(40, 16, 96, 4, torch.bfloat16)
    x = inputs.x.requires_grad_()

    def narrowed(t):
        return t[:, :1] if t.shape == inputs.weight.shape else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, narrowed):
        y = fastlora.lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, path="cpu")
        with pytest.raises(RuntimeError, match="weight came back from saved-tensor hooks as"):
            y.sum().backward()


@pytest.mark.usefixtures("either_node")
def test_a_new_verdict_is_obeyed_at_once(monkeypatch):
    layer, x = fastlora.FusedLoRALinear(8, 6, r=2), torch.randn(3, 8, requires_grad=True)
    layer(x)
    with profile() as before:
        layer(x)
    monkeypatch.setattr(check, "_verdicts", {})
    monkeypatch.setattr(check, "examine", lambda path, device: "it is Sunday")
    fastlora.selfcheck("cpu")
    with profile() as after:
        layer(x)
    choice.forget()
    products = [[event.name for event in run.function_events].count("aten::addmm_") for run in (before, after)]
    assert not products[0] and products[1]  # which only path `torch` adds in place


def test_an_instruction_set_that_nobody_measured_is_not_chosen(monkeypatch):
    monkeypatch.setattr(cpu, "MEASURED", ())
    problem = Problem(64, 8, 8, 2, torch.float32, torch.float32, CPU, False)
    assert choice.choose(problem).path == "torch" and "has not been measured" in choice.choose(problem).reason


def test_arguments_are_counted_and_typed():
    with pytest.raises(TypeError, match="17 arguments needed, got 1"):
        cpu._cpu.forward(1)
    with pytest.raises(TypeError):
        cpu._cpu.mask(0, "a", 2, 0.1, 0)
    with pytest.raises(ValueError, match="no memory"):
        cpu._cpu.mask(0, 2, 2, 0.1, 0)
    at = torch.zeros(9).data_ptr()
    with pytest.raises(ValueError, match="out of range"):
        cpu._cpu.forward(at, 0, 0, at, 1, at, at, at, 1, 1, 1, cpu._cpu.MAX_RANK + 1, 999, 1.0, 0.0, 0, 1)
    with pytest.raises(ValueError, match="dtype's code is out of range"):
        cpu._cpu.forward(at, 0, 3, at, 1, at, at, at, 1, 1, 1, 1, 1, 1.0, 0.0, 0, 1)
    with pytest.raises(ValueError, match="abacus"):
        cpu._cpu.use_instructions("abacus")
    with pytest.raises(TypeError, match="needs to be a str"):
        cpu._cpu.use_instructions(5)
    with pytest.raises(ValueError, match="out of range"):  # not 1, which is what is left of it in 32 bits
        cpu._cpu.forward(at, 0, 0, at, 1, at, at, at, 1, 1, 1, 2**32 + 1, 1, 1.0, 0.0, 0, 1)


@pytest.mark.parametrize("threads", [0, 1, 7, 100])
def test_any_number_of_threads_gives_the_same_forward(threads):
    x, A, B = torch.randn(700, 90), torch.randn(20, 90), torch.randn(80, 20)
    y, S = torch.ones(700, 80), torch.empty(700, 20)
    addresses = [t.data_ptr() for t in (A, B, S)]
    cpu._cpu.forward(y.data_ptr(), 0, 0, x.data_ptr(), 90, *addresses, 700, 80, 90, 20, 20, 1.0, 0.0, 0, threads)
    torch.testing.assert_close(y, 1 + x @ A.t() @ B.t(), rtol=1e-5, atol=1e-3)


def test_the_node_in_cpp_serves_what_is_ordinary_and_leaves_the_rest(monkeypatch):
    if functional.NODE is None:
        pytest.skip("this is about the node in C++")
    served = []

    class Watched:
        def __getattr__(self, name):
            def call(*arguments):
                y = getattr(node, name)(*arguments)
                served.append(y is not None)
                return y

            return call

    node = functional.NODE
    monkeypatch.setattr(functional, "NODE", Watched())
    monkeypatch.setattr(autograd, "NODE", Watched())
    fastlora.selfcheck("cpu")  # nothing is chosen yet: Python chooses first
    layer = fastlora.FusedLoRALinear(64, 48, r=4, lora_dropout=0.1)
    x = torch.randn(5, 7, 64, requires_grad=True)

    def run(x, **keywords):
        served.clear()
        y = fastlora.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, 2, 0.1, **keywords)
        y.sum().backward()
        return list(served)

    assert run(x) == run(x, training=False) == [False, True]
    assert run(x) == run(x, training=False) == run(x.detach()) == run(x[0].t().contiguous().t()) == [True]
    assert run(x, path="cpu") == [True] and run(x, path="torch") == [False]  # whose masks are ATen's
    assert [run(x, path="torch", training=False) for _ in range(3)] == [[False], [False], [True]]
    assert run(torch._neg_view(x)) == [False, False]  # path `cpu` in Python
    assert run(x.as_subclass(Mine)) == [False]  # the reference
    monkeypatch.setenv("FASTLORA_PATH", "torch")
    assert run(x) == [False] and run(x, training=False) == [True]
    monkeypatch.delenv("FASTLORA_PATH")
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x) in ([True], [False, True])
    layer.half()
    assert run(x.detach().half()) == [False, True] and run(x.detach().half()) == [True]
    with pytest.raises(ValueError, match="lora_A has shape"):
        fastlora.lora_linear(x.half(), layer.weight, torch.randn(4, 9).half(), layer.lora_B)
    with pytest.raises(TypeError, match="8 or 9 arguments needed, got 1"):
        node.lora_linear(x)
