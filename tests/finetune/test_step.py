"""The training step: accumulation, precision, compilation, and the reasons for which it is not captured."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn

import fastlora
from fastlora.finetune import parallel
from fastlora.finetune import step as steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def tiny(dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    fastlora.inject(model, r=4, lora_alpha=4, lora_dropout=dropout)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimiser


def batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator)


def test_accumulated_batches_step_like_one():
    x, y = batch(11)
    model, optimiser = tiny()
    whole = steps.Step(model, optimiser, steps.Settings())([(x, y)])
    other, optimiser = tiny()
    parts = steps.Step(other, optimiser, steps.Settings())([(x[:8], y[:8]), (x[8:], y[8:])])
    torch.testing.assert_close(whole, parts)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_sums_are_of_the_model_before_the_step():
    x, y = batch(9)
    model, optimiser = tiny()
    before = copy.deepcopy(model)
    ((loss, correct),) = steps.Step(model, optimiser, steps.Settings())([(x, y)]).tolist()
    assert loss == pytest.approx(nn.functional.cross_entropy(before(x), y, reduction="sum").item(), rel=1e-5)
    assert correct == (before(x).argmax(-1) == y).sum()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_clip_bounds_the_gradient():
    model, optimiser = tiny()
    steps.Step(model, optimiser, steps.Settings(clip=1e-3))([batch(9)])
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precisions_learn_and_keep_float32_parameters(precision):
    model, optimiser = tiny()
    step = steps.Step(model, optimiser, steps.Settings(precision=precision))
    losses = [step([batch(32)])[0, 0].item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_float16_skips_a_step_that_overflows():
    model, optimiser = tiny()
    step = steps.Step(model, optimiser, steps.Settings(precision="float16"))
    before = [p.clone() for p in model.parameters()]
    scale = step.scaler.get_scale()
    x, y = batch(8)
    step([(x * 1e6, y)])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert step.scaler.get_scale() < scale


def test_reasons_for_plain_steps(monkeypatch):
    on = steps.Settings(graph=True)
    assert "asked for" in steps.why_plain(CUDA, steps.Settings(graph=False))
    assert "cpu" in steps.why_plain(CPU, on)
    assert "float16" in steps.why_plain(CUDA, steps.Settings(graph=True, precision="float16"))
    assert steps.why_plain(CUDA, on) is None
    assert steps.why_plain(CUDA, steps.Settings(graph=True, precision="bfloat16", compile=True)) is None
    monkeypatch.setattr(parallel, "size", lambda: 2)
    assert "processes" in steps.why_plain(CUDA, on)


class FakeGraphs:
    """Stands in for CUDA graphs: a capture records a closure, a replay calls it."""

    def __init__(self, monkeypatch, fail=False):
        self.captures, self.replays, owner = 0, 0, self

        class Captured:
            def __init__(self, step, group):
                owner.captures += 1
                if fail:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                self.step = step

            def replay(self, group):
                owner.replays += 1
                return self.step._run(group)

        class Stream:
            def wait_stream(self, other):
                pass

        monkeypatch.setattr(steps, "_Captured", Captured)
        monkeypatch.setattr(steps, "_leave_capture", lambda stream: None)
        monkeypatch.setattr(steps, "why_plain", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def stepped(model, optimiser, sizes, **settings):
    step = steps.Step(model, optimiser, steps.Settings(**settings))
    return step, [step([batch(rows, seed)])[0, 0].item() for seed, rows in enumerate(sizes)]


def test_each_shape_is_warmed_up_captured_once_and_replayed(monkeypatch):
    sizes = [8, 8, 5, 8, 8, 8, 5, 8]
    _, want = stepped(*tiny(), sizes)
    fake = FakeGraphs(monkeypatch)
    model, optimiser = tiny()
    _plain(optimiser)
    step, got = stepped(model, optimiser, sizes)
    assert got == want
    assert (fake.captures, fake.replays) == (1, 3) and step.plain is None


def _plain(optimiser):
    """The CPU has no capturable AdamW: leave the flag that the step sets without effect."""

    class Groups(dict):
        def __setitem__(self, key, value):
            if key not in ("capturable", "lr"):
                super().__setitem__(key, value)

    optimiser.param_groups = [Groups(group) for group in optimiser.param_groups]
    return optimiser


def test_a_failed_capture_says_why_and_goes_on(monkeypatch):
    sizes = [8] * 6
    _, want = stepped(*tiny(), sizes)
    fake = FakeGraphs(monkeypatch, fail=True)
    model, optimiser = tiny()
    _plain(optimiser)
    with pytest.warns(UserWarning, match="without a CUDA graph: capture failed: operation not permitted"):
        step, got = stepped(model, optimiser, sizes)
    assert got == want and fake.captures == 1
    assert step.plain == "capture failed: operation not permitted when stream is capturing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_captured_steps_equal_plain_ones(dropout):
    losses = []
    for graph in (False, True):
        model, _ = tiny(dropout)
        model.cuda()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.cuda.manual_seed(0)
        step = steps.Step(model, optimiser, steps.Settings(graph=graph))
        group = [tuple(value.cuda() for value in batch(8))]
        losses.append([step(group)[0, 0].item() for _ in range(10)])
        assert (step.plain is None) == graph
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_compiled_step_has_no_graph_break_and_the_same_loss(monkeypatch):
    # what inductor makes of the graph is in tests/test_compile.py, and takes its time
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    sizes = [8, 8, 8]
    _, want = stepped(*tiny(), sizes)
    _, got = stepped(*tiny(), sizes, compile=True)
    assert got == pytest.approx(want, rel=1e-5)
