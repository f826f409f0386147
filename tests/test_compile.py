"""Under torch.compile: registered ops with fakes, one graph, the same numbers."""

from __future__ import annotations

from dataclasses import replace

import accuracy
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastlora


def operands(dtype=torch.float32, requires_grad=True):
    inputs = accuracy.draw(12, 10, 14, 3, dtype)
    tensors = [t.clone() for t in (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias)]
    for t in (tensors[0], tensors[2], tensors[3]):
        t.requires_grad_(requires_grad)
    return tensors


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck_forward(dropout_p):
    x, weight, A, B, bias = operands()
    seed = torch.tensor(5) if dropout_p else None
    torch.library.opcheck(torch.ops.fastlora.forward, (x, weight, A, B, bias, 2.0, dropout_p, seed, ""))


def test_opcheck_backward():
    x, weight, A, B, _ = operands(requires_grad=False)
    S, dy = torch.randn(12, 3), torch.randn(12, 10)
    for needs in ((True, True, True), (False, True, True), (True, False, False)):
        torch.library.opcheck(torch.ops.fastlora.backward, (dy, x, weight, A, B, S, 2.0, 0.0, None, "", *needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_obeys_the_error_rule(dynamic):
    compiled = torch.compile(fastlora.lora_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (12, 5):
        inputs = accuracy.draw(M, 10, 14, 3, torch.float32)
        accuracy.check(compiled, inputs)


def test_inductor_trains_a_layer_as_eager_does():
    layer = fastlora.FusedLoRALinear(14, 10, r=3)
    torch.nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 6, 14)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(x)
        y.square().mean().backward()
        results.append((y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)


def test_dropout_in_a_graph_uses_one_mask_and_differs_between_calls():
    inputs = replace(accuracy.draw(64, 32, 32, 32, torch.float32, bias=False, scaling=1.0), dropout_p=0.5)
    inputs = replace(inputs, weight=torch.zeros(32, 32), lora_A=torch.eye(32), lora_B=torch.eye(32))
    compiled = torch.compile(fastlora.lora_linear, fullgraph=True, backend="aot_eager")
    masks = []
    for _ in range(2):
        got = accuracy.run(compiled, inputs)  # Y = mask * x / (1 - p): the mask shows
        mask = got["Y"] != 0
        assert not accuracy.violations(got, replace(inputs, mask=mask))
        masks.append(mask)
    assert not torch.equal(*masks)


def test_eager_and_compiled_calls_draw_alike():
    inputs = accuracy.draw(64, 32, 40, 4, torch.float32)
    arguments = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, 2.0, 0.5)
    results = []
    for function in (fastlora.lora_linear, torch.compile(fastlora.lora_linear, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        results.append(function(*arguments))
    assert torch.equal(*results)


def test_autocast_in_a_graph():
    x, weight, A, B, bias = operands()

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastlora.lora_linear(x, weight, A, B, bias, 2.0)

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert graph.dtype is torch.bfloat16 and torch.equal(graph, step(x))


def test_one_graph_serves_every_number_of_rows():
    layer, graphs = fastlora.FusedLoRALinear(14, 10, r=3), CompileCounter()
    compiled = torch.compile(layer, backend=graphs, dynamic=True, fullgraph=True)
    for M in range(2, 14):
        compiled(torch.randn(M, 14))
    assert graphs.frame_count == 1
    exported = torch.export.export(layer, (torch.randn(5, 14),), dynamic_shapes={"x": {0: torch.export.Dim("M")}})
    x = torch.randn(9, 14)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("together", [0, 3])
def test_compiled_autograd_reads_what_the_node_keeps(dropout_p, together):
    import torch._dynamo.compiled_autograd as compiled

    x, weight, A, B, bias = operands()
    others = [(weight, A.detach().clone().requires_grad_(), B.detach().clone(), None, 0.3 * i) for i in range(together)]

    def loss():
        torch.manual_seed(3)
        if together:
            return sum(y.square().sum() for y in fastlora.lora_linears(x, others, dropout_p))
        return fastlora.lora_linear(x, weight, A, B, bias, 1.7, dropout_p).square().sum()

    learning = [x, *(one[1] for one in others)] if together else [x, A, B]
    want = torch.autograd.grad(loss(), learning)
    with compiled._enable(lambda graph: torch.compile(graph, backend="eager")):
        loss().backward()
    for t, gradient in zip(learning, want, strict=True):
        torch.testing.assert_close(t.grad, gradient)
