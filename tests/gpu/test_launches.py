"""How many launches a training step of a query, a key and a value takes: the counts of fastlora/README.md.

python -m tests.campaigns.sync python -m pytest tests/gpu/test_launches.py
"""

from __future__ import annotations

import ctypes
from unittest import mock

import pytest
import torch
from campaigns import sync

import fastlora
from fastlora import choice
from fastlora.node import NODE
from fastlora.paths import PATHS

HOLLOW = torch.cuda.is_available() and hasattr(ctypes.CDLL("libcuda.so.1"), "hollow_launches")
pytestmark = pytest.mark.skipif(not HOLLOW or NODE is None, reason="needs the node, and the stand-in, which counts")
SMALL, LARGE = (64, 256, 256, 8), (4096, 4096, 4096, 16)  # M, N, K, R


@pytest.mark.parametrize("p", [0.0, 0.1])  # a mask's seed takes no launch
@pytest.mark.parametrize(
    "path, sizes, alone, together",
    [
        ("split", SMALL, 17, 5),
        ("onepass", SMALL, 14, 5),
        ("hybrid", SMALL, 23, 10),  # six of each are ATen's products
        ("split", LARGE, 23, 11),
        ("onepass", LARGE, 20, 11),
        ("hybrid", LARGE, 29, 14),
    ],
)
def test_launches_of_a_step(path, sizes, alone, together, p):
    M, N, K, R = sizes

    def zeros(*shape, learns=False):
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=learns)

    x, dys = zeros(M, K, learns=True), [zeros(M, N) for _ in range(3)]
    qkv = [(zeros(N, K), zeros(R, K, learns=True), zeros(N, R, learns=True), zeros(N), 2.0) for _ in range(3)]
    assert counted(path, lambda: [fastlora.lora_linear(x, *one, p) for one in qkv], x, qkv, dys) == alone
    assert counted(path, lambda: fastlora.lora_linears(x, qkv, p), x, qkv, dys) == together


@pytest.mark.parametrize("path, nodes", [("torch", 3), ("hybrid", 1)])
def test_path_torch_computes_them_one_by_one(path, nodes):
    x = torch.zeros(64, 32, device="cuda", requires_grad=True)
    A, B = torch.zeros(4, 32, device="cuda", requires_grad=True), torch.zeros(48, 4, device="cuda", requires_grad=True)
    qkv = [(torch.zeros(48, 32, device="cuda"), A, B, None, 2.0)] * 3
    with sync.trusted(), mock.patch.object(choice, "choose", lambda problem: choice.Choice(PATHS[path], "")):
        choice.forget()
        for _ in range(3):
            ys = fastlora.lora_linears(x, qkv)
    choice.forget()
    assert len({y.grad_fn for y in ys}) == nodes


def counted(path, call, x, qkv, dys) -> int:
    learning, gpu = (x, *(t for one in qkv for t in one[1:3])), ctypes.CDLL(sync.LIBRARY)
    chosen = mock.patch.object(choice, "choose", lambda problem: choice.Choice(PATHS[path], ""))
    with sync.trusted(), chosen:
        choice.forget()
        for _ in range(3):  # the first ones compile and record
            before = gpu.hollow_launches()
            torch.autograd.grad(call(), learning, dys)
        count = gpu.hollow_launches() - before
    choice.forget()
    return count
