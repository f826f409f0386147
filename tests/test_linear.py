"""The layer as a module: its arguments, its state, copying, moving. The arithmetic is tested elsewhere."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlora import FusedLoRALinear, reference
from fastlora.linear import EagerLoRALinear

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def trained(layer: FusedLoRALinear) -> FusedLoRALinear:
    """The layer with an update that is not zero."""
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8).clone()


def conv1d(n: int, k: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)


def test_shapes_names_and_who_trains():
    layer = FusedLoRALinear(5, 3, r=2)
    assert [(name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()] == [
        ("weight", (3, 5), False),
        ("bias", (3,), False),
        ("lora_A", (2, 5), True),
        ("lora_B", (3, 2), True),
    ]
    assert FusedLoRALinear(5, 3, bias=False).bias is None
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


def test_it_starts_at_the_base_layer():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(7, 64)
    expected = linear(x)
    for r in (1, 8, 64):
        layer = FusedLoRALinear.from_linear(linear, r=r, lora_dropout=0.5)
        assert torch.equal(layer(x), expected)
        assert layer.lora_A.abs().max() > 0


def test_lora_a_starts_as_in_peft():
    torch.manual_seed(0)
    layer = FusedLoRALinear(400, 4, r=64)
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_base_starts_as_an_nn_linear():
    torch.manual_seed(3)
    expected = nn.Linear(6, 4)
    torch.manual_seed(3)
    layer = FusedLoRALinear(6, 4)
    assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize(
    ("given", "scaling", "alpha"),
    [
        ({"r": 8, "lora_alpha": 16}, 2.0, 16),
        ({"r": 4, "lora_alpha": 1}, 0.25, 1),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0, 6),
        ({"r": 2, "scaling": 0.1}, 0.1, 0.2),
        ({"r": 4, "scaling": -3, "use_rslora": True}, -3.0, -6),
        ({"r": 3, "lora_alpha": 0}, 0.0, 0),
    ],
)
def test_scaling(given, scaling, alpha):
    layer = FusedLoRALinear(5, 3, **given)
    assert type(layer.scaling) is float and layer.scaling == scaling
    assert layer.lora_alpha == alpha


@pytest.mark.parametrize(
    ("given", "error", "name"),
    [
        ({"r": 0}, ValueError, "r must"),
        ({"r": -1}, ValueError, "r must"),
        ({"r": True}, ValueError, "r must"),
        ({"r": 2.0}, TypeError, "r must"),
        ({"in_features": 0}, ValueError, "in_features"),
        ({"out_features": "3"}, TypeError, "out_features"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha"),
        ({"scaling": math.inf}, ValueError, "scaling"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"lora_dropout": None}, TypeError, "lora_dropout"),
        ({"dtype": torch.int8}, TypeError, "dtype"),
        ({"adapter_dtype": torch.float16}, ValueError, "adapter_dtype"),
        ({"adapter_dtype": torch.bfloat16, "dtype": torch.float16}, ValueError, "adapter_dtype"),
    ],
)
def test_arguments_out_of_range_are_named(given, error, name):
    with pytest.raises(error, match=name):
        FusedLoRALinear(**{"in_features": 5, "out_features": 3} | given)


@pytest.mark.parametrize("cls", [FusedLoRALinear, EagerLoRALinear])
def test_forward_passes_everything_on(cls):
    layer = trained(cls(5, 3, r=2, lora_alpha=3, lora_dropout=0.25, dtype=torch.float64)).eval()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = reference.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, 1.5)
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.manual_seed(0)
    assert not torch.allclose(layer(x), expected)
    layer.lora_dropout = 0.0
    torch.testing.assert_close(layer(x), expected)
    layer.scaling = 0.0
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_only_the_adapter_gets_gradients():
    layer = trained(FusedLoRALinear(5, 3, r=2))
    layer(torch.randn(4, 5)).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_A.grad.abs().sum() > 0 and layer.lora_B.grad.abs().sum() > 0


def test_requires_grad_leaves_the_base_frozen():
    layer = FusedLoRALinear(5, 3).requires_grad_(False)
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.requires_grad_() is layer
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_over_a_16_bit_base(dtype):
    layer = trained(FusedLoRALinear(16, 8, r=4, dtype=dtype, adapter_dtype=torch.float32))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype == dtype
    y = layer(torch.randn(3, 16, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert "adapter_dtype=torch.float32" in repr(layer)


class TestFromLinear:
    def test_shares_the_parameters_of_a_linear(self):
        linear = nn.Linear(5, 3).eval()
        layer = FusedLoRALinear.from_linear(linear, r=2)
        assert layer.weight is linear.weight and layer.bias is linear.bias
        assert not linear.weight.requires_grad and not layer.training
        assert type(EagerLoRALinear.from_linear(linear)) is EagerLoRALinear
        assert FusedLoRALinear.from_linear(nn.Linear(5, 3, bias=False)).bias is None

    def test_follows_dtype_and_device(self):
        layer = FusedLoRALinear.from_linear(nn.Linear(5, 3, dtype=torch.bfloat16), adapter_dtype=torch.float32)
        assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
        assert FusedLoRALinear.from_linear(nn.Linear(5, 3, device="meta")).lora_A.is_meta

    @pytest.mark.parametrize("n", [3, 5])  # 5: square, where a forgotten transposition would go unnoticed
    def test_conv1d_is_a_transposed_view(self, n):
        base = conv1d(n, 5)
        x = torch.randn(2, 4, 5)
        expected = base(x)
        layer = FusedLoRALinear.from_linear(base, r=2)
        assert layer.weight.shape == (n, 5) and (layer.in_features, layer.out_features) == (5, n)
        assert layer.weight.data_ptr() == base.weight.data_ptr()
        torch.testing.assert_close(layer(x), expected)

    @pytest.mark.parametrize("merged", [False, True])
    def test_conv1d_state_dict_keeps_the_base_layout(self, merged):
        base = conv1d(5, 5)
        layer = trained(FusedLoRALinear.from_linear(base, r=2))
        if merged:
            layer.merge()
        state = layer.state_dict()
        assert torch.equal(state["weight"], base.weight)
        other = FusedLoRALinear.from_linear(conv1d(5, 5), r=2)
        other.load_state_dict(state)
        assert torch.equal(other.weight, base.weight.t()) and torch.equal(other.lora_B, layer.lora_B)
        third = FusedLoRALinear.from_linear(conv1d(5, 5), r=2)
        third.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        assert torch.equal(third.weight, base.weight.t())
        assert torch.equal(third(torch.eye(5)), other(torch.eye(5)))

    def test_conv1d_keeps_its_layout_when_copied_and_moved(self):
        layer = trained(FusedLoRALinear.from_linear(conv1d(3, 5), r=2))
        x = torch.randn(4, 5)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
            assert twin.weight.stride() == (1, 3) and twin.fan_in_fan_out
            assert torch.equal(twin(x), layer(x))
            assert torch.equal(twin.state_dict()["weight"], layer.state_dict()["weight"])

    def test_what_cannot_be_taken_over_is_refused(self):
        class Own(nn.Linear):
            def forward(self, x):
                return -super().forward(x)

        parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        hooked = nn.Linear(5, 3)
        hooked.forward = lambda x: x
        quantised = nn.Linear(5, 3)
        quantised.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.uint8), requires_grad=False)
        for base in (nn.Conv2d(1, 1, 1), Own(5, 3), parametrized, hooked, quantised, None):
            with pytest.raises(TypeError, match="linear"):
                FusedLoRALinear.from_linear(base)


class TestModule:
    def test_deepcopy_and_pickle_are_independent_and_equal(self):
        layer = trained(FusedLoRALinear(5, 3, r=2, lora_dropout=0.1, use_rslora=True)).eval()
        x = torch.randn(4, 5)
        saved = io.BytesIO()
        torch.save(layer, saved)
        saved.seek(0)
        for twin in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(saved, weights_only=False),
        ):
            assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)
            assert [p.requires_grad for p in twin.parameters()] == [False, False, True, True]
            assert twin.weight.data_ptr() != layer.weight.data_ptr()

    def test_load_state_dict_names_the_shape_that_is_wrong(self):
        layer = FusedLoRALinear(5, 3, r=2)
        with pytest.raises(RuntimeError, match=r"size mismatch for lora_A.*\n.*lora_B"):
            layer.load_state_dict(FusedLoRALinear(5, 3, r=4).state_dict())
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict(FusedLoRALinear(3, 3, r=2).state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
            layer.load_state_dict(nn.Linear(5, 3).state_dict())

    def test_a_base_checkpoint_loads_by_its_own_names(self):
        linear, layer = nn.Linear(5, 3), FusedLoRALinear(5, 3)
        result = layer.load_state_dict(linear.state_dict(), strict=False)
        assert result.missing_keys == ["lora_A", "lora_B"] and not result.unexpected_keys
        assert torch.equal(layer.weight, linear.weight)

    def test_meta_then_memory_then_parameters(self):
        layer = FusedLoRALinear(5, 3, device="meta")
        assert all(p.is_meta for p in layer.parameters())
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(math.nan)
        layer.reset_parameters()
        x = torch.randn(4, 5)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and layer(x).isfinite().all()

    def test_reset_lora_parameters_leaves_the_base(self):
        layer = trained(FusedLoRALinear(5, 3))
        before, old = bits(layer.weight), layer.lora_A.clone()
        layer.reset_lora_parameters()
        assert torch.equal(bits(layer.weight), before) and not layer.lora_B.any() and not torch.equal(layer.lora_A, old)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_to_dtype(self, dtype):
        layer = trained(FusedLoRALinear(5, 3)).to(dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer(torch.randn(2, 5, dtype=dtype)).dtype == dtype
        assert {p.dtype for p in layer.half().parameters()} == {torch.float16}

    def test_repr(self):
        assert repr(FusedLoRALinear(5, 3, r=2, lora_alpha=1, lora_dropout=0.1)) == (
            "FusedLoRALinear(in_features=5, out_features=3, bias=True, r=2, scaling=0.5, lora_dropout=0.1)"
        )

    def test_functional_call_and_swapped_parameters(self):
        layer, other = trained(FusedLoRALinear(5, 3)), trained(FusedLoRALinear(5, 3))
        x = torch.randn(4, 5)
        torch.testing.assert_close(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), other(x))
