"""Adapters on disk: exact round trips, and saving that replaces an adapter whole or not at all."""

from __future__ import annotations

import copy
import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapter import IDS, adapter_entries, same_values, shaken, small, trained
from torch import nn

import fastlora
from fastlora import FusedLoRALinear, inject, load_adapter, save_adapter
from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterError, read_config
from fastlora.errors import WorkError


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(fastlora.errors, "_said", set())


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("wide", [False, True])
    def test_every_bit_comes_back(self, tmp_path, dtype, wide):
        base = small().to(dtype)
        kept = torch.float32 if wide else None
        wanted = {"r": 2, "target_modules": ["fc1"], "modules_to_save": ["fc2"]}
        model = shaken(inject(copy.deepcopy(base), adapter_dtype=kept, **wanted))
        save_adapter(model, tmp_path)
        fresh = load_adapter(copy.deepcopy(base), tmp_path).eval()
        again = load_adapter(inject(copy.deepcopy(base), adapter_dtype=kept, **wanted), tmp_path).eval()
        for other in (fresh, again):
            for name, value in model.state_dict().items():
                assert torch.equal(other.state_dict()[name], value)
            assert torch.equal(other(IDS), model(IDS))
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name for name, p in fresh.named_parameters() if p.requires_grad}
        assert fresh.fc1.lora_A.dtype == model.fc1.lora_A.dtype

    def test_the_file_is_what_the_safetensors_library_reads_and_writes(self, saved):
        model = load_adapter(small(), saved)
        tensors = load_file(saved / WEIGHTS_NAME)
        assert set(tensors) == {
            "base_model.model.fc1.lora_A.weight",
            "base_model.model.fc1.lora_B.weight",
            "base_model.model.fc2.weight",
        }
        assert torch.equal(tensors["base_model.model.fc1.lora_A.weight"], model.fc1.lora_A)
        save_file(tensors, saved / WEIGHTS_NAME, metadata={"format": "pt"})
        other = load_adapter(small(), saved)
        assert torch.equal(other.eval()(IDS), model.eval()(IDS))

    @pytest.mark.parametrize(
        "given",
        [
            {"r": 3, "lora_alpha": 1},
            {"use_rslora": True},
            {"rank_pattern": {"fc1": 5}, "alpha_pattern": {r"^fc\d": 7}, "target_modules": "all-linear"},
            {"target_modules": r"fc[1]", "modules_to_save": []},
            {"target_modules": ["fc1", "fc2"], "exclude_modules": ["fc2"], "modules_to_save": []},
        ],
    )
    def test_the_configuration_comes_back(self, tmp_path, given):
        model = trained(**given)
        save_adapter(model, tmp_path)
        other = load_adapter(small(), tmp_path).eval()
        assert other.fc1.scaling == model.fc1.scaling and other.fc1.r == model.fc1.r
        assert torch.equal(other(IDS), model(IDS))
        save_adapter(other, tmp_path / "again")
        written, again = (read_config(folder) for folder in (tmp_path, tmp_path / "again"))
        assert again == written

    def test_a_name_that_is_the_end_of_another(self, tmp_path):
        def make():
            return nn.ModuleDict({"fc1": nn.Linear(3, 3), "block": nn.ModuleDict({"fc1": nn.Linear(3, 3)})})

        model = make().requires_grad_(False)
        model["fc1"] = FusedLoRALinear.from_linear(model["fc1"], r=2)
        save_adapter(model, tmp_path)
        assert read_config(tmp_path).target_modules == "fc1"
        other = load_adapter(make(), tmp_path)
        assert type(other["fc1"]) is FusedLoRALinear and type(other["block"]["fc1"]) is nn.Linear

    def test_alphas_under_names_of_any_letters(self, tmp_path):
        def make():
            return nn.ModuleDict({"a-b (1)|ü": nn.Linear(3, 3), "plain": nn.Linear(3, 3)})

        model = inject(make(), r=2, alpha_pattern={".*ü": 7})
        save_adapter(model, tmp_path)
        other = load_adapter(make(), tmp_path)
        assert [layer.scaling for layer in other.values()] == [3.5, 8]

    def test_tensors_that_share_memory(self, tmp_path):
        def make():
            model = small()
            model.tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
            model.tied["b"].weight = model.tied["a"].weight
            return model

        model = shaken(inject(make(), r=2, target_modules=["fc1"], modules_to_save=["tied"]))
        save_adapter(model, tmp_path)
        assert same_values(load_adapter(make(), tmp_path), model)

    def test_layers_put_in_by_hand(self, tmp_path):
        model = small()
        model.fc1 = FusedLoRALinear.from_linear(model.fc1, r=2, scaling=0.1)
        model.fc2 = FusedLoRALinear.from_linear(model.fc2, r=3, scaling=1.5, use_rslora=True)
        with pytest.warns(fastlora.errors.FastLoRAWarning, match=r"not in the saved adapter: embed\.weight"):
            save_adapter(model, tmp_path)
        model.embed.requires_grad_(False)
        shaken(model)
        save_adapter(model, tmp_path)
        other = load_adapter(small(), tmp_path).eval()
        assert (other.fc1.scaling, other.fc2.scaling, other.fc2.r) == (0.1, 1.5, 3)
        assert torch.equal(other(IDS), model(IDS))

    def test_modules_named_when_saving(self, tmp_path):
        model = small()
        model.embed.requires_grad_(False)
        model.fc1 = FusedLoRALinear.from_linear(model.fc1, r=2)
        nn.init.ones_(model.fc2.weight)
        save_adapter(model, tmp_path, modules_to_save=["fc2"])
        assert torch.equal(load_adapter(small(1), tmp_path).fc2.weight, torch.ones(3, 5))
        with pytest.raises(ValueError, match="modules_to_save matches 'fc1'"):
            save_adapter(model, tmp_path, modules_to_save=["fc1"])

    def test_what_is_left_out_is_said_unless_the_caller_said_what_to_save(self, tmp_path):
        model = inject(small(), r=2, target_modules=["fc1"])
        model.fc2.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_adapter(model, tmp_path, modules_to_save=[])
        with pytest.warns(fastlora.errors.FastLoRAWarning, match=r"not in the saved adapter: fc2\.weight"):
            save_adapter(model, tmp_path)
        assert sum(tensor.numel() for tensor in adapter_entries(tmp_path).values()) == 2 * (6 + 5)

    def test_a_scaling_set_by_hand_is_what_is_saved_and_taken_over(self, tmp_path):
        model = trained(r=3)
        model.fc1.scaling = 0.3
        save_adapter(model, tmp_path)
        other = load_adapter(inject(small(), r=3, target_modules=["fc1"]), tmp_path).eval()
        assert other.fc1.scaling == 0.3
        assert torch.equal(other(IDS), model(IDS))

    def test_any_scaling_survives_as_alpha(self, tmp_path):
        draw = random.Random(0)
        model = inject(small(), r=7, target_modules=["fc1"])
        for _ in range(15):
            model.fc1.scaling = draw.uniform(-3, 3)
            save_adapter(model, tmp_path)
            scaling = load_adapter(small(), tmp_path).fc1.scaling
            assert scaling == pytest.approx(model.fc1.scaling, rel=2.3e-16)

    def test_merged_is_saved_as_unmerged_and_not_loaded_into(self, tmp_path):
        model = trained()
        expected = model(IDS)
        model.fc1.merge()
        save_adapter(model, tmp_path)
        assert torch.equal(load_adapter(small(), tmp_path).eval()(IDS), expected)
        with pytest.raises(ValueError, match="unmerge"):
            load_adapter(model, tmp_path)

    def test_wrapped_models_are_saved_as_the_model_inside(self, tmp_path):
        model = trained()
        save_adapter(nn.DataParallel(model), tmp_path)
        compiled = torch.compile(small(), backend="eager")
        assert load_adapter(compiled, tmp_path) is compiled
        assert torch.equal(compiled._orig_mod.eval()(IDS), model(IDS))

    def test_buffers_of_saved_modules(self, tmp_path):
        def make():
            return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        model = inject(make(), r=2, target_modules=["0"], modules_to_save=["1"])
        model.train()(torch.randn(8, 4))
        save_adapter(model, tmp_path)
        other = load_adapter(make(), tmp_path)
        assert torch.equal(other[1].running_var, model[1].running_var) and other[1].num_batches_tracked == 1

    def test_saving_replaces_an_adapter_and_nothing_else(self, saved):
        (saved / "report.json").write_text("{}")
        model = trained(r=4)
        save_adapter(model, saved)
        assert sorted(os.listdir(saved)) == [CONFIG_NAME, WEIGHTS_NAME, "report.json"]
        assert load_adapter(small(), saved).fc1.r == 4


class TestSavingRefuses:
    def test_models_that_have_nothing_to_save(self, tmp_path):
        with pytest.raises(ValueError, match="no LoRA layers"):
            save_adapter(small(), tmp_path)
        with pytest.raises(ValueError, match="itself a LoRA layer"):
            save_adapter(FusedLoRALinear(3, 3), tmp_path)
        with pytest.raises(TypeError, match="model must be"):
            save_adapter({}, tmp_path)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, saved, value):
        before = (saved / WEIGHTS_NAME).read_bytes()
        model = trained()
        with torch.no_grad():
            model.fc1.lora_B[0, 0] = value
        with pytest.raises(ValueError, match=r"fc1\.lora_B\.weight is not finite"):
            save_adapter(model, saved)
        assert (saved / WEIGHTS_NAME).read_bytes() == before

    def test_tensors_without_data(self, tmp_path):
        with pytest.raises(ValueError, match="meta"):
            save_adapter(trained().to("meta"), tmp_path)

    def test_places_that_are_not_an_adapters(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(AdapterError, match="not a directory"):
            save_adapter(trained(), tmp_path / "file")
        for foreign in ('{"peft_type": "IA3"}', "[]", "not json"):
            (tmp_path / CONFIG_NAME).write_text(foreign)
            with pytest.raises(AdapterError):
                save_adapter(trained(), tmp_path)
            assert (tmp_path / CONFIG_NAME).read_text() == foreign
        assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, "file"]

    @pytest.mark.parametrize("failing", ["write_bytes", "write_text"])
    def test_a_full_disk_leaves_the_old_adapter(self, saved, monkeypatch, failing):
        before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, failing, full)
        with pytest.raises(WorkError, match="No space left"):
            save_adapter(trained(r=4), saved)
        assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before

    @pytest.mark.parametrize("moment", ["unlink", "replace 1", "replace 2"])
    def test_a_kill_at_any_moment_leaves_old_new_or_refused(self, saved, monkeypatch, moment):
        class Killed(BaseException):
            pass

        replaced = []

        def replace(source, target, real=os.replace):
            replaced.append(target)
            if moment == f"replace {len(replaced)}":
                raise Killed
            real(source, target)

        def unlink(path, missing_ok=False, real=Path.unlink):
            if moment == "unlink":
                raise Killed
            real(path, missing_ok=missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            patched.setattr(Path, "unlink", unlink)
            with pytest.raises(Killed):
                save_adapter(trained(r=4), saved)
        if moment == "unlink":
            assert load_adapter(small(), saved).fc1.r == 2
        else:
            with pytest.raises(AdapterError, match="interrupted"):
                load_adapter(small(), saved)
        save_adapter(trained(r=4), saved)
        assert load_adapter(small(), saved).fc1.r == 4
