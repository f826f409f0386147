"""Dropout's seeds as the node in C++ computes them for a GPU: torch's own, in number and order.

On a real GPU, or on the stand-in, where torch's own draws are garbage, and the node's are compared with Philox itself:

    python -m tests.campaigns.sync python -m pytest tests/gpu/test_seeds.py
"""

from __future__ import annotations

import ctypes
import functools
import time
from unittest import mock

import pytest
import torch
from campaigns import sync

import fastlora
from fastlora import choice, node
from fastlora.node import NODE
from fastlora.paths import PATHS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or NODE is None, reason="needs the node, and a GPU or the stand-in for one"
)
DEVICE = torch.device("cuda", 0)
AGREE, SOONER = node._seeds_agree, node._seeds_are_sooner
HOLLOW = torch.cuda.is_available() and hasattr(ctypes.CDLL("libcuda.so.1"), "hollow_launches")


@pytest.fixture(autouse=True)
def served():
    """Path `torch`, recorded."""
    chosen = mock.patch.object(choice, "choose", lambda problem: choice.Choice(PATHS["torch"], ""))
    trust = sync.trusted() if HOLLOW else mock.MagicMock()
    with trust, chosen:
        choice.forget()
        drawn(3)
        yield
    choice.forget()


@functools.cache
def projection(_: int = 0):
    weight, A, B = (torch.zeros(size, device=DEVICE) for size in ((4, 8), (2, 8), (4, 2)))
    return weight, A.requires_grad_(), B.requires_grad_(), None, 1.0


def drawn(calls: int, together: int = 0) -> list[int]:
    """The seeds of calls one after the other, or of one call of several projections."""
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        for _ in range(calls):
            x = torch.zeros(3, 8, device=DEVICE, requires_grad=True)
            if together:
                fastlora.lora_linears(x, [projection(i) for i in range(together)], 0.5)
            else:
                fastlora.lora_linear(x, *projection(), 0.5)
    return [int(t) for t in seen if t.dtype is torch.int64]


def computed(seed: int, draws: range, threads=(0,)) -> list[int]:
    return [NODE.randint(seed, 4 * draw, thread) for draw in draws for thread in threads]


def offset() -> int:
    return torch.cuda.default_generators[0].get_offset()


def test_seeds_follow_the_generator():
    torch.manual_seed(7)
    assert drawn(60) == computed(7, range(60)) and offset() == 240


def test_projections_that_share_x_have_the_seeds_of_one_draw():
    with mock.patch.object(choice, "choose", lambda problem: choice.Choice(PATHS["hybrid"], "")):
        choice.forget()
        drawn(2, together=3)  # compiled and recorded
        torch.manual_seed(7)
        assert drawn(2, together=3) == computed(7, range(2), (0, 2, 4)) and offset() == 8


def test_a_state_that_is_restored_gives_the_same_seeds():
    torch.manual_seed(9)
    drawn(5)
    state = torch.cuda.get_rng_state()
    first = drawn(3)
    torch.cuda.set_rng_state(state)
    assert drawn(3) == first == computed(9, range(5, 8))
    torch.cuda.default_generators[0].set_offset(12)
    assert drawn(1) == computed(9, range(3, 4))


def test_what_inference_drew_hinders_no_training():
    torch.manual_seed(10)
    with torch.inference_mode():
        fastlora.lora_linear(torch.zeros(3, 8, device=DEVICE), *projection(), 0.5)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert drawn(2) == computed(10, range(1, 3))


def test_a_graph_draws_by_a_launch_that_its_replays_repeat():
    drawn(1)
    graph, before = torch.cuda.CUDAGraph(), offset()
    with torch.cuda.graph(graph), torch.no_grad():
        fastlora.lora_linear(torch.zeros(3, 8, device=DEVICE), *projection(), 0.5)
    graph.replay()
    assert offset() > before


@pytest.mark.skipif(HOLLOW, reason="torch's draws are garbage here")
def test_they_are_torchs():
    assert AGREE(DEVICE)
    torch.manual_seed(11)
    found = drawn(5)
    torch.manual_seed(11)
    assert found == [int(torch.randint(2**63 - 1, (), device=DEVICE)) for _ in range(5)]


@pytest.mark.skipif(not HOLLOW, reason="a GPU's draws are right")
def test_where_torch_draws_otherwise_the_node_is_not_trusted():
    assert not AGREE(DEVICE)


@pytest.mark.parametrize("seconds, sooner", [(0.0, True), (0.002, False)])
def test_which_is_sooner_is_measured(seconds, sooner, monkeypatch):
    monkeypatch.setattr(node, "NODE", mock.Mock(write_seeds=lambda *_: time.sleep(seconds) if seconds else True))
    assert SOONER(DEVICE) is sooner
