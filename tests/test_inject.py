"""Which layers `inject` replaces (PEFT is the judge), what else it changes, and that an error changes nothing."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedLoRALinear, inject
from fastlora.linear import EagerLoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x + self.q_proj(x) * self.v_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.pre_classifier = nn.Linear(6, 6)
        self.classifier = nn.Linear(6, 2)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.pre_classifier(x).relu())


IDS = torch.arange(8)[None]


def fused(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def fingerprint(model: nn.Module) -> list:
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return [modules, [p[:3] for p in parameters], hasattr(model, "fastlora_config")]


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(fastlora.errors, "_said", set())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_names_are_whole_or_end_after_a_dot(net):
    result = inject(net, r=2, target_modules=["q_proj", "layers.1.v_proj", "classifier"])
    assert result is net
    # "classifier" is not the end of "pre_classifier": no dot before it
    assert set(fused(net)) == {f"layers.{i}.q_proj" for i in range(3)} | {"layers.1.v_proj", "classifier"}
    assert trainable(net) == {f"{name}.{part}" for name in fused(net) for part in ("lora_A", "lora_B")}


def test_the_model_computes_and_keeps_what_it_did(net):
    expected, weights = net(IDS), {name: p.detach().clone() for name, p in net.named_parameters()}
    places = {name: p.data_ptr() for name, p in net.named_parameters()}
    inject(net, target_modules="all-linear", lora_dropout=0.3)
    assert torch.equal(net(IDS), expected)
    now = dict(net.named_parameters())
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert all(now[name].data_ptr() == place for name, place in places.items())


def test_training_moves_only_what_it_should(net):
    inject(net, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        net(IDS).square().mean().backward()
        optimiser.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(net)
    assert any("norm" in name for name in moved)


def test_patterns_of_rank_and_alpha(net):
    inject(
        net,
        r=2,
        lora_alpha=4,
        target_modules="all-linear",
        use_rslora=True,
        rank_pattern={"layers.0.q_proj": 4, "q_proj": 3},
        alpha_pattern={r"^layers\.\d\.v_proj": 8},
    )
    layers = fused(net)
    assert [layers[f"layers.{i}.q_proj"].r for i in range(3)] == [4, 3, 3]
    assert layers["layers.0.q_proj"].scaling == 2.0
    assert layers["layers.2.v_proj"].scaling == 8 / 2**0.5
    assert layers["classifier"].scaling == 4 / 2**0.5


@pytest.mark.parametrize(
    "wanted",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["layers.1.q_proj", "v_proj"]},
        {"target_modules": ["classifier"]},
        {"target_modules": {"q_proj", "pre_classifier"}},
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear", "exclude_modules": ["v_proj", "classifier"]},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": r"q_proj"},
        {"target_modules": r"layers\.[02]\..*_proj", "exclude_modules": r".*v_proj"},
        {"target_modules": "all-linear", "modules_to_save": ["layers.1"]},
        {"target_modules": "all-linear", "modules_to_save": ["q_proj"]},
        {"target_modules": ["q_proj", "classifier"], "modules_to_save": ["classifier"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"1.q_proj": 5, "q_proj": 3, "layers.0.q_proj": 7}},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.(0|2)\.q": 5, r"^q_proj": 3}},
    ],
)
def test_peft_chooses_the_same_layers(net, wanted):
    peft = pytest.importorskip("peft")
    twin = copy.deepcopy(net)
    try:
        theirs = peft.get_peft_model(twin, peft.LoraConfig(r=2, **copy.deepcopy(wanted))).base_model.model
    except ValueError:
        before = fingerprint(net)
        with pytest.raises(ValueError, match="matches no module"):
            inject(net, r=2, **wanted)
        assert fingerprint(net) == before
        return
    expected = {name: m.r["default"] for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    inject(net, r=2, **wanted)
    assert {name: layer.r for name, layer in fused(net).items()} == expected
    wrapped = peft.utils.other.ModulesToSaveWrapper
    saved = {name for name, module in theirs.named_modules() if isinstance(module, wrapped)}
    assert {name for name in trainable(net) if "lora_" not in name} == {
        f"{name}.{key}" for name in saved for key, _ in net.get_submodule(name).named_parameters()
    }


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM", None])
def test_all_linear_leaves_out_the_head_that_peft_leaves_out(task):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    kind = transformers.GPT2ForSequenceClassification if task == "SEQ_CLS" else transformers.GPT2LMHeadModel
    model = kind(config)
    twin = copy.deepcopy(model)
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    theirs = theirs.base_model.model
    expected = {name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    inject(model, r=2, target_modules="all-linear", task_type=task)
    assert set(fused(model)) == expected and not {"lm_head", "score"} & expected
    assert all(layer.fan_in_fan_out for layer in fused(model).values())
    assert ("score.weight" in trainable(model)) == (task == "SEQ_CLS")


class TestErrorsChangeNothing:
    @pytest.mark.parametrize(
        ("wanted", "error", "message"),
        [
            ({"target_modules": ["q_porj"]}, ValueError, "'q_porj'.*matches no module.*q_proj"),
            ({"target_modules": r"nothing.*"}, ValueError, "matches no module.*names there: .*v_proj"),
            ({"target_modules": []}, ValueError, "matches no module"),
            ({"target_modules": ""}, ValueError, "matches no module"),
            ({"target_modules": "("}, ValueError, "target_modules is not a regular expression"),
            ({"target_modules": None}, TypeError, "target_modules must be a list"),
            ({"target_modules": [1]}, TypeError, "target_modules must hold names"),
            ({"target_modules": ["embed"]}, ValueError, "'embed'.*got Embedding"),
            ({"target_modules": ["layers.0"]}, ValueError, "'layers.0'.*got Block"),
            ({"modules_to_save": ["head"]}, ValueError, "modules_to_save.*matches no module"),
            ({"modules_to_save": "norm"}, TypeError, "modules_to_save must be a list"),
            ({"r": 0}, ValueError, "r must"),
            ({"lora_alpha": float("nan")}, ValueError, "lora_alpha"),
            ({"lora_dropout": 2}, ValueError, "lora_dropout"),
            ({"adapter_dtype": torch.float16}, ValueError, "adapter_dtype"),
            ({"rank_pattern": {"v_proj": 0}}, ValueError, "r must"),
            ({"rank_pattern": {"(": 1}}, ValueError, "rank_pattern"),
            ({"task_type": "CLS"}, ValueError, "task_type"),
            ({"layer_class": nn.Linear}, TypeError, "layer_class"),
        ],
    )
    def test_arguments(self, net, wanted, error, message):
        before = fingerprint(net)
        with pytest.raises(error, match=message) as caught:
            inject(net, **wanted)
        assert fingerprint(net) == before and "\n" not in str(caught.value)

    def test_a_linear_by_itself(self):
        with pytest.raises(ValueError, match=r"FusedLoRALinear\.from_linear"):
            inject(nn.Linear(3, 3), target_modules="all-linear")
        with pytest.raises(TypeError, match="model must be"):
            inject("model")

    def test_a_second_time(self, net):
        inject(net, target_modules=["q_proj"])
        before = fingerprint(net)
        with pytest.raises(ValueError, match="already has LoRA layers"):
            inject(net, target_modules=["v_proj"])
        assert fingerprint(net) == before

    def test_after_peft(self, net):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"fastlora\.peft\.patch"):
            inject(model, target_modules=["v_proj"])

    def test_one_unsupported_layer_among_good_ones(self, net):
        net.layers[2].q_proj.forward = lambda x: x
        before = fingerprint(net)
        with pytest.raises(ValueError, match=r"layers\.2\.q_proj.*forward of its own"):
            inject(net, target_modules=["q_proj"])
        assert fingerprint(net) == before

    def test_a_projection_that_is_never_called(self):
        attention = nn.ModuleDict({"self_attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
        before = fingerprint(attention)
        with pytest.raises(ValueError, match="MultiheadAttention"):
            inject(attention, target_modules=["out_proj"])
        assert fingerprint(attention) == before
        with pytest.warns(fastlora.errors.FastLoRAWarning, match=r"self_attn\.out_proj"):
            inject(attention, target_modules="all-linear")
        assert set(fused(attention)) == {"fc"}


def test_a_name_that_matches_nothing_beside_one_that_does_is_said(net):
    with pytest.warns(fastlora.errors.FastLoRAWarning, match="'gate_proj'"):
        inject(net, target_modules=["q_proj", "gate_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(Net(), target_modules=["q_proj", "layers.1.v_proj"])


def test_a_layer_under_two_names_is_replaced_under_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    inject(model, target_modules=["a"])
    assert isinstance(model["a"], FusedLoRALinear) and model["b"]["c"] is model["a"]


def test_tied_head_as_target_stays_tied_and_frozen(net):
    net.classifier = nn.Linear(6, 11, bias=False)
    net.classifier.weight = net.embed.weight
    inject(net, target_modules=["classifier"])
    assert net.classifier.weight is net.embed.weight and not net.embed.weight.requires_grad


def test_tied_head_to_save_trains_a_copy(net):
    net.classifier = nn.Linear(6, 11, bias=False)
    net.classifier.weight = net.embed.weight
    expected = net(IDS)
    with pytest.warns(fastlora.errors.FastLoRAWarning, match="trains a copy"):
        inject(net, target_modules=["q_proj"], modules_to_save=["classifier"])
    assert net.classifier.weight is not net.embed.weight and torch.equal(net.classifier.weight, net.embed.weight)
    assert net.classifier.weight.requires_grad and not net.embed.weight.requires_grad
    assert torch.equal(net(IDS), expected)


def test_hooks_keep_working_and_can_be_removed(net):
    seen = []
    first = net.layers[0].q_proj.register_forward_hook(lambda module, x, y: seen.append(type(module)))
    second = net.layers[0].q_proj.register_forward_pre_hook(lambda module, x: seen.append("before"))
    inject(net, target_modules=["q_proj"])
    net(IDS)
    assert seen == ["before", FusedLoRALinear]
    first.remove()
    second.remove()
    net(IDS)
    assert len(seen) == 2


def test_every_kind_of_hook_runs_on(net):
    layer, seen = net.layers[0].q_proj, []
    for kind, options in (
        ("forward_pre_hook", {"with_kwargs": True}), ("forward_pre_hook", {}),
        ("forward_hook", {"with_kwargs": True, "always_call": True}), ("forward_hook", {}),
        ("full_backward_pre_hook", {}), ("full_backward_hook", {}),
    ):  # fmt: skip
        getattr(layer, f"register_{kind}")(lambda *a, kind=kind: seen.append((kind, len(a))), **options)
    net.embed.requires_grad_(True)
    net(IDS).sum().backward()
    before = list(seen)
    assert len(before) == 6
    seen.clear()
    inject(net, target_modules=["q_proj"], modules_to_save=["embed"])
    net(IDS).sum().backward()
    assert seen == before


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_own_encoder_does_not_bypass_the_adapter(mode, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inject(model, target_modules=["linear1", "linear2"])
    for part in fused(model).values():
        nn.init.normal_(part.lora_B)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.set_grad_enabled(mode == "grad"):
        got = model(x, src_key_padding_mask=mask)
    expected = model.train()(x, src_key_padding_mask=mask)  # when training, torch calls the layers one by one
    kept = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(got[kept], expected[kept])


def test_layer_class_dtype_and_mode(net):
    inject(
        net.to(torch.bfloat16).eval(),
        target_modules=["q_proj"],
        layer_class=EagerLoRALinear,
        adapter_dtype=torch.float32,
    )
    for layer in fused(net).values():
        assert type(layer) is EagerLoRALinear and layer.lora_A.dtype == torch.float32 and not layer.training


def test_the_configuration_is_recorded_and_travels(net):
    inject(net, r=3, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        config = model.fastlora_config
        assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, ("q_proj",))
        assert config.modules_to_save == ("classifier", "score") and config.task_type == "SEQ_CLS"


def test_all_linear_is_recorded_by_names(net):
    inject(net, target_modules="all-linear", modules_to_save=["classifier"])
    assert net.fastlora_config.target_modules == tuple(sorted(fused(net)))
    assert "pre_classifier" not in fused(net)  # PEFT saves by the end of the name, dot or not


def test_frozen_integer_parameters_are_left_alone(net):
    net.classifier.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    inject(net, target_modules=["q_proj"], modules_to_save=["classifier"])
    assert not net.classifier.steps.requires_grad and net.classifier.weight.requires_grad
