"""Several adapters trained together: each as if it were alone with its own rows."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import accuracy, autograd, functional
from fastlora.bank import FusedLoRABank
from fastlora.linear import EagerLoRALinear
from fastlora.paths import PATHS
from fastlora.paths.bank import Bank
from fastlora.paths.problem import draw_seed

ADAPTERS = {"a": {"r": 2, "lora_alpha": 8}, "b": {"r": 5, "lora_dropout": 0.5}, "c": {"r": 3, "use_rslora": True}}
OWNERS = {
    "groups": [0, 0, 1, 1, 2, None],
    "any order": [2, 1, 0, None, 2, 1, 0],
    "one": [1, 1, 1],
    "none": [None, None],
    "one idle": [2, None, 0],
}


def call(path):
    def function(x, weight, lora_A, lora_B, bias, scaling, p, bank):
        return autograd.run(PATHS[path], x, weight, lora_A, lora_B, bias, scaling, p, bank)

    return function


def case(path, owners, ps, dtype=torch.float32, adapter_dtype=None, each=7, N=40, K=50):
    bank = Bank.of((3, 8, 1), (2.0, 0.5, -1.3), ps, owners, each, torch.device("cpu"))
    inputs = accuracy.draw(len(owners) * each, N, K, bank.R, dtype, adapter_dtype=adapter_dtype)
    inputs = replace(inputs, scaling=1.0, dropout_p=max(ps), bank=bank)
    torch.manual_seed(1)
    if bank.drops:
        mask = PATHS[path].mask(draw_seed(inputs.x.device), *inputs.x.shape, bank)
        inputs = replace(inputs, mask=mask)
    torch.manual_seed(1)  # so that the call draws what the mask was made of
    return inputs


@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), (0.1, 0.0, 0.5)], ids=["whole", "dropout"])
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_each_adapter_is_as_if_alone(path, dtype, owners, ps):
    inputs = case(path, owners, ps, dtype)
    got = accuracy.run(call(path), inputs)
    assert not accuracy.violations(got, inputs)
    again = accuracy.run(call(path), case(path, owners, ps, dtype))
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_float32_adapters_over_a_16_bit_base(path, dtype):
    inputs = case(path, [0, 1, 2, None, 1], (0.1, 0.2, 0.0), dtype, torch.float32)
    assert not accuracy.violations(accuracy.run(call(path), inputs), inputs)


def test_another_scaling_is_noticed():
    inputs = case("cpu", OWNERS["groups"], (0.0, 0.0, 0.0))
    got = accuracy.run(call("cpu"), replace(inputs, bank=replace(inputs.bank, scalings=(2.0, 0.5, -1.31))))
    assert all(what.startswith("adapter 2") for what in accuracy.violations(got, inputs))
    assert accuracy.violations(got, inputs)


def test_a_cpu_keeps_what_is_not_finite_to_its_own_adapter():
    inputs = case("cpu", OWNERS["groups"], (0.0, 0.0, 0.0))
    clean = accuracy.run(call("cpu"), inputs)
    x, dy = inputs.x.clone(), inputs.dy.clone()
    x[inputs.bank.rows == 1] = torch.inf
    dy[inputs.bank.rows == 1] = torch.nan
    found = accuracy.run(call("cpu"), replace(inputs, x=x, dy=dy))
    rows, ranks = inputs.bank.rows != 1, [*range(3), 11]
    assert torch.equal(found["Y"][rows], clean["Y"][rows]) and torch.equal(found["dX"][rows], clean["dX"][rows])
    assert torch.equal(found["dA"][ranks], clean["dA"][ranks]) and torch.equal(
        found["dB"][:, ranks], clean["dB"][:, ranks]
    )
    assert not found["dA"][3:11].isfinite().any()


@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_second_derivatives(path):
    bank = Bank.of((2, 3), (2.0, 0.5), (0.0, 0.25), [0, 1, None, 1], 3, torch.device("cpu"))
    inputs = accuracy.draw(12, 5, 6, 5, torch.float32)
    leaves = [t.double().float().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]
    x, A, B = leaves

    def second(function):
        torch.manual_seed(3)
        y = function()
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    torch.manual_seed(3)
    mask = PATHS[path].mask(draw_seed(x.device), 12, 6, bank)

    def eager():
        update = bank.masked((x * mask) @ A.t()) @ B.t()
        return torch.nn.functional.linear(x, inputs.weight, inputs.bias) + update

    run = call(path)
    found = second(lambda: run(x, inputs.weight, A, B, inputs.bias, 1.0, 0.25, bank))
    for got, wanted in zip(found, second(eager), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_adapters_drop_apart(path):
    bank = Bank.of((1, 1), (1.0, 1.0), (0.5, 0.5), [0, 1], 50, torch.device("cpu"))
    mask = PATHS[path].mask(torch.tensor(5), 100, 64, bank)
    assert 0.4 < (mask[:50] == mask[50:]).double().mean() < 0.6


def test_each_row_s_threshold_is_met_to_the_bit():
    bank = Bank.of((1, 1), (1.0, 1.0), (0.3, 0.0), [0, 1, None], 200, torch.device("cpu"))
    mask, alone = (PATHS["torch"].mask(torch.tensor(5), 600, 2048, chance) for chance in (bank, 0.3))
    assert torch.equal(mask[:200], alone[:200]) and mask[200:].all()


def test_wide_adapters_and_transforms_take_atens_operations():
    bank = Bank.of((150, 200), (2.0, 0.5), (0.0, 0.0), [0, 1, None], 2, torch.device("cpu"))
    inputs = replace(accuracy.draw(6, 30, 40, 350, torch.float32), scaling=1.0, bank=bank)

    def function(x, weight, A, B, bias, scaling, p, bank):
        return functional.bank_linear(x, weight, A, B, bias, bank)

    assert not accuracy.violations(accuracy.run(function, inputs), inputs)
    batched = torch.func.vmap(
        lambda x: functional.bank_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, None, bank)
    )
    plain = functional.bank_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, None, bank)
    torch.testing.assert_close(batched(inputs.x[None])[0], plain)


# ---- models ----


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)


def trained(model):
    """The same model, its lora_B no zeros."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    return model


def banked(**settings):
    arguments = {"adapters": ADAPTERS, "target_modules": ["0", "2"], "modules_to_save": ["4"]}
    return trained(fastlora.inject(net(), **arguments | settings))


def single(name, model, tmp_path, monkeypatch=None):
    """A model with that adapter alone, by way of its files."""
    fastlora.save_adapter(model, tmp_path / name, adapter=name)
    return fastlora.load_adapter(net(), tmp_path / name)


NAMES = ["a", "b", "b", None, "c", "a"]


def test_a_routed_model_is_each_adapter_s_own(tmp_path):
    model = banked().eval()
    x = torch.randn(6, 3, 12, requires_grad=True)
    with fastlora.route(model, NAMES):
        y = model(x)
    base = net()
    for name in ("a", "b", "c", None):
        rows = [i for i, other in enumerate(NAMES) if other == name]
        alone = base if name is None else single(name, model, tmp_path).eval()
        torch.testing.assert_close(y[rows], alone(x[rows]))


def test_training_moves_each_adapter_by_its_own_samples(tmp_path):
    model = banked(adapters={n: own | {"lora_dropout": 0.0} for n, own in ADAPTERS.items()})
    alone = {name: single(name, model, tmp_path) for name in ADAPTERS}
    x, wanted = torch.randn(6, 3, 12), torch.randn(6, 3, 4)
    with fastlora.route(model, NAMES):
        (model(x) - wanted).pow(2).sum().backward()
    for name, other in alone.items():
        rows = [i for i, one in enumerate(NAMES) if one == name]
        (other(x[rows]) - wanted[rows]).pow(2).sum().backward()
        for layer in ("0", "2"):
            own, lone = model.get_submodule(layer).adapters[name], other.get_submodule(layer)
            torch.testing.assert_close(own.lora_A.grad, lone.lora_A.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.lora_B.grad, lone.lora_B.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[4].copies[name].weight.grad, other[4].weight.grad, rtol=1e-4, atol=1e-5)
    assert model[4].base.weight.grad is None


def test_parameter_groups_one_adapter_each():
    model = banked()
    groups = [{"params": model[0].adapters[name].parameters(), "lr": lr} for name, lr in (("a", 0.1), ("b", 0.0))]
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    optimiser = torch.optim.SGD(groups)
    before = {name: model[0].adapters[name].lora_A.clone() for name in ("a", "b")}
    with fastlora.route(model, NAMES):
        model(torch.randn(6, 12)).sum().backward()
    optimiser.step()
    assert not torch.equal(before["a"], model[0].adapters["a"].lora_A)
    assert torch.equal(before["b"], model[0].adapters["b"].lora_A)


def test_peft_loads_one_of_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = banked().eval()
    fastlora.save_adapter(model, tmp_path, adapter="b")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    x = torch.randn(4, 12)
    with fastlora.route(model, ["b"] * 4):
        torch.testing.assert_close(model(x), theirs(x))


def test_an_adapter_is_loaded_into_a_bank(tmp_path):
    model, other = banked(), banked()
    with torch.no_grad():
        other[0].adapters["b"].lora_A.add_(1.0)
        other[4].copies["b"].weight.add_(1.0)
    fastlora.save_adapter(other, tmp_path, adapter="b")
    fastlora.load_adapter(model, tmp_path, adapter="b")
    assert torch.equal(model[0].adapters["b"].lora_A, other[0].adapters["b"].lora_A)
    assert torch.equal(model[4].copies["b"].weight, other[4].copies["b"].weight)
    assert not torch.equal(model[4].copies["a"].weight, other[4].copies["b"].weight)


def test_dropout_repeats_and_keeps_its_share():
    model = banked()
    x = torch.ones(40, 12)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        with fastlora.route(model, ["a", "b"] * 20):
            found.append(model[0](x).detach())
    assert torch.equal(*found)
    assert (found[0][0::2] - found[0][0]).abs().max() < 1e-5  # "a" drops nothing
    assert (found[0][1::2] - found[0][1]).abs().max() > 1e-2


def test_the_base_is_shared_and_moves_with_the_model():
    model = banked()
    assert len({id(one.weight) for one in model[0].adapters.values()}) == 1
    model.to(torch.bfloat16)
    assert len({id(one.weight) for one in model[0].adapters.values()}) == 1
    with fastlora.route(model, NAMES):
        assert model(torch.randn(6, 12, dtype=torch.bfloat16)).dtype is torch.bfloat16
        assert fastlora.explain(model[0], torch.randn(6, 12, dtype=torch.bfloat16)).path in ("cpu", "torch")
    twin = copy.deepcopy(model)
    assert twin[0].adapters["a"].weight is twin[0].adapters["b"].weight


def test_checkpointing_inside_the_route():
    model, x = banked(adapters={"a": {"r": 2}, "b": {"r": 3}}), torch.randn(4, 12, requires_grad=True)
    gradients = []
    for through in (lambda x: checkpoint(model, x, use_reentrant=False), model):
        model.zero_grad()
        with fastlora.route(model, ["a", "b", None, "a"]):
            through(x).sum().backward()
        gradients.append(model[0].adapters["b"].lora_A.grad.clone())
    assert torch.equal(*gradients)


def test_routes_nest_and_end():
    model, x = banked().eval(), torch.randn(2, 12)
    with fastlora.route(model, ["a", "b"]):
        outer = model(x)
        with fastlora.route(model, ["b", "a"]):
            assert not torch.allclose(model(x), outer)
        torch.testing.assert_close(model(x), outer)
    with pytest.raises(RuntimeError, match="several adapters"):
        model(x)


def test_a_quantised_base():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    model = fastlora.inject(nn.Sequential(linear.to("cpu")), adapters={"a": {"r": 2}, "b": {"r": 3}})
    x = torch.randn(4, 64)
    with fastlora.route(model, ["a", None, "b", "b"]):
        y = trained(model)(x)
    torch.testing.assert_close(y[1:2], linear(x[1:2]))
    torch.testing.assert_close(y[2:], model[0].adapters["b"](x[2:]))


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"adapters": {}}, TypeError, "adapters must be a map"),
        ({"adapters": {"a.b": {}}}, ValueError, "'a.b'"),
        ({"adapters": {"keys": {}}}, ValueError, "'keys'"),
        ({"adapters": {"a": {"rank": 3}}}, ValueError, "has 'rank'; an adapter may have r, lora_alpha"),
        ({"adapters": {"a": 3}}, ValueError, "has 3"),
        ({"adapters": {"a": {"r": 0}}}, ValueError, "r must be an integer of at least 1"),
        ({"use_dora": True}, ValueError, "use_dora"),
        ({"layer_class": EagerLoRALinear}, ValueError, "layer_class must be FusedLoRALinear with several adapters"),
    ],
)
def test_mistakes_in_adapters_are_named_and_change_nothing(settings, error, says):
    model = net()
    with pytest.raises(error, match=says):
        fastlora.inject(model, **{"adapters": ADAPTERS, "target_modules": ["0"]} | settings)
    assert not any(isinstance(layer, FusedLoRABank) for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mistakes_in_routes_are_named():
    model, x = banked(), torch.randn(3, 12)
    for names, error, says in (
        ("ab", TypeError, "names must be a list"),
        (["a", "z"], ValueError, "holds 'z'; the model has the adapters a, b, c"),
    ):
        with pytest.raises(error, match=says), fastlora.route(model, names):
            pass
    with fastlora.route(model, ["a", "b"]), pytest.raises(ValueError, match="2 samples"):
        model(x)
    with pytest.raises(ValueError, match="no adapters to choose from"), fastlora.route(net(), ["a"]):
        pass


def test_which_adapter_is_saved_must_be_said(tmp_path):
    for adapter in (None, "z"):
        with pytest.raises(ValueError, match="the model has a, b, c"):
            fastlora.save_adapter(banked(), tmp_path, adapter=adapter)
    with pytest.raises(ValueError, match="without a name"):
        fastlora.save_adapter(fastlora.inject(net(), target_modules=["0"]), tmp_path, adapter="a")
    assert not any(tmp_path.iterdir())


def test_one_adapter_beside_the_base_alone():
    model, x = banked().eval(), torch.randn(4, 12)
    with fastlora.route(model, ["a", None, "a", None]):
        y = model(x)
    torch.testing.assert_close(y[1::2], net()(x[1::2]))
    assert not torch.allclose(y[0::2], net()(x[0::2]))


@pytest.mark.parametrize("names", [["a", "b"], ["a", "a"], [None, None], ["a", None]])
def test_autocast_gives_its_dtype_whoever_has_rows(names):
    model, x = banked().eval(), torch.randn(2, 12)
    with torch.autocast("cpu", torch.bfloat16), fastlora.route(model, names):
        y = model[0](x)
    assert y.dtype is torch.bfloat16
    with fastlora.route(model, names):
        torch.testing.assert_close(y.float(), model[0](x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("names", [["a"] * 7, [None] * 7, ["a", "b"]])
def test_as_many_names_as_samples_are_needed_whoever_has_rows(names):
    model = banked()
    with fastlora.route(model, names), pytest.raises(ValueError, match=f"{len(names)} samples"):
        model(torch.randn(4, 12))


def test_a_route_belongs_to_one_thread():
    model, x = banked().eval(), torch.randn(2, 12)
    with fastlora.route(model, ["a", "b"]), ThreadPoolExecutor(1) as other:

        def elsewhere():
            with fastlora.route(model, ["b", "b"]):
                pass

        before = model(x)
        with pytest.raises(RuntimeError, match="another thread is inside"):
            other.submit(elsewhere).result()
        assert torch.equal(model(x), before)


def test_the_bank_of_a_route_is_kept():
    model, x = banked(), torch.randn(2, 12)
    kept = []
    for _ in range(2):
        with fastlora.route(model, ["a", "b"]):
            model(x)
            kept.append(model[0].__dict__["_route"])
    assert kept[0] is kept[1] and kept[0]._banks


def test_a_layer_s_own_attributes():
    layer = banked()[0]
    assert layer.weight is layer.adapters["a"].weight and layer.bias is layer.adapters["a"].bias
    assert (layer.in_features, layer.out_features) == (12, 16)


def test_explain_names_what_runs_where_one_adapter_is_too_wide_for_the_kernels():
    model = fastlora.inject(nn.Sequential(nn.Linear(256, 300)), adapters={"a": {"r": 160}, "b": {"r": 2}})
    with fastlora.route(model, ["a", "b"]):
        assert fastlora.explain(model[0], torch.randn(2, 256)).path == "torch"
