"""Merging: exact in the sum, exact on the way back, in every dtype and for weights that others share."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_linear import FLOATS, bits, conv1d, trained
from torch import nn
from torch.nn.utils import prune

from fastlora import FusedLoRALinear
from fastlora.linear import EagerLoRALinear


class TestMerge:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_unmerge_restores_every_bit(self, dtype, transposed):
        torch.manual_seed(0)
        base = conv1d(33, 17) if transposed else nn.Linear(17, 33)
        layer = trained(FusedLoRALinear.from_linear(base.to(dtype), r=4, lora_alpha=100))
        before, parameter = bits(layer.weight), layer.weight
        for _ in range(3):
            layer.merge()
            assert layer.merged and not torch.equal(bits(layer.weight), before)
            layer.unmerge()
            assert not layer.merged and layer.weight is parameter and torch.equal(bits(layer.weight), before)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_merged_weight_is_the_sum_rounded_once(self, dtype, transposed):
        base = conv1d(33, 17) if transposed else nn.Linear(17, 33)
        layer = trained(FusedLoRALinear.from_linear(base.to(dtype), r=4))
        exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        layer.merge()
        torch.testing.assert_close(layer.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
        x = torch.randn(5, 17, dtype=dtype)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert type(layer.weight) is nn.Parameter and not layer.weight.requires_grad

    def test_merged_computes_what_unmerged_computes(self):
        for cls in (FusedLoRALinear, EagerLoRALinear):
            layer = trained(cls(17, 33, r=4, lora_dropout=0.5, dtype=torch.float64))
            x = torch.randn(5, 17, dtype=torch.float64)
            expected = layer.eval()(x)
            layer.train().merge()
            torch.testing.assert_close(layer(x), expected)
            assert "merged=True" in repr(layer)

    def test_drawing_anew_unmerges(self):
        layer = trained(FusedLoRALinear(5, 3))
        layer.merge()
        layer.reset_parameters()
        assert not layer.merged and torch.equal(layer(torch.eye(5)), F.linear(torch.eye(5), layer.weight, layer.bias))

    def test_twice_is_once_and_unmerge_alone_does_nothing(self):
        layer = trained(FusedLoRALinear(5, 3))
        layer.unmerge()
        before = bits(layer.weight)
        layer.merge()
        once = bits(layer.weight)
        layer.merge()
        assert torch.equal(bits(layer.weight), once)
        layer.unmerge()
        assert torch.equal(bits(layer.weight), before)

    def test_weights_that_are_not_numbers_come_back(self):
        layer = trained(FusedLoRALinear(5, 3))
        with torch.no_grad():
            layer.weight[0] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
        before = bits(layer.weight)
        layer.merge()
        layer.unmerge()
        assert torch.equal(bits(layer.weight), before)

    @pytest.mark.parametrize("value", [math.nan, 1e38])
    def test_a_sum_that_is_not_finite_is_refused(self, value):
        layer = FusedLoRALinear(5, 3)
        with torch.no_grad():
            layer.lora_A.fill_(1e5)
            layer.lora_B.fill_(value)
        before = bits(layer.weight)
        with pytest.raises(ValueError, match="not finite"):
            layer.merge()
        assert not layer.merged and torch.equal(bits(layer.weight), before)

    def test_a_tied_weight_keeps_its_value_elsewhere(self):
        embedding = nn.Embedding(7, 5)
        head = nn.Linear(5, 7, bias=False)
        head.weight = embedding.weight
        layer = trained(FusedLoRALinear.from_linear(head))
        before = bits(embedding.weight)
        layer.merge()
        assert torch.equal(bits(embedding.weight), before)
        layer.unmerge()
        assert layer.weight is embedding.weight

    def test_merging_does_not_wake_the_adapter(self):
        layer = trained(FusedLoRALinear(5, 3))
        layer.merge()
        assert not layer(torch.randn(2, 5)).requires_grad
        layer.unmerge()
        assert layer(torch.randn(2, 5)).requires_grad

    def test_state_dict_speaks_of_the_unmerged_layer(self):
        layer = trained(FusedLoRALinear(5, 3))
        plain = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.merge()
        weight = layer.weight
        merged = layer.state_dict()
        assert layer.weight is weight and not torch.equal(weight, plain["weight"])
        assert list(merged) == list(plain) and all(torch.equal(merged[name], plain[name]) for name in plain)
        other = FusedLoRALinear(5, 3)
        other.load_state_dict(merged)
        x = torch.randn(4, 5)
        layer.unmerge()
        assert torch.equal(other(x), layer(x))

    @pytest.mark.parametrize("assign", [False, True])
    def test_loading_into_a_merged_layer_merges_anew(self, assign):
        source, layer = trained(FusedLoRALinear(5, 3)), trained(FusedLoRALinear(5, 3))
        layer.merge()
        layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        assert layer.merged
        merged = layer.weight.clone()
        layer.unmerge()
        assert torch.equal(layer.weight, source.weight)
        source.merge()
        assert torch.equal(merged, source.weight)

    @pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.half(), lambda m: m.to("cpu")])
    def test_the_kept_weight_moves_along(self, change):
        layer = trained(FusedLoRALinear(5, 3))
        before = layer.weight.detach().clone()
        layer.merge()
        change(layer)
        assert len(list(layer.parameters())) == 4
        layer.unmerge()
        assert torch.equal(layer.weight, before.to(layer.weight.dtype)) and layer.weight.dtype == layer.lora_A.dtype

    def test_copies_of_a_merged_layer_unmerge_alone(self):
        layer = trained(FusedLoRALinear(5, 3))
        before = bits(layer.weight)
        layer.merge()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.merged
            twin.unmerge()
            assert torch.equal(bits(twin.weight), before)
        assert layer.merged


@pytest.mark.parametrize("how", ["pruned", "parametrised"])
def test_a_weight_that_is_computed_from_others_stays_as_it_is(how):
    layer, x = trained(FusedLoRALinear(6, 5, r=2)), torch.randn(3, 6)
    if how == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        nn.utils.parametrizations.weight_norm(layer, "weight")
    before, names = layer(x), [name for name, _ in layer.named_parameters()]
    state = layer.state_dict()
    assert "weight" not in state
    assert [name for name, _ in layer.named_parameters()] == names
    with pytest.raises(ValueError, match="weight is pruned or parametrised"):
        layer.merge()
    assert not layer.merged and torch.equal(layer(x), before)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
