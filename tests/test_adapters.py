"""Adapters on disk: exact round trips, PEFT as the other side, and files from strangers, which must change nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedLoRALinear, adapter_files, inject, load_adapter, save_adapter
from fastlora.adapter_config import from_json
from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from fastlora.errors import UserError, WorkError

IDS = torch.arange(8)[None]


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(fastlora.errors, "_said", set())


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [("embed", nn.Embedding(11, 6)), ("fc1", nn.Linear(6, 5)), ("fc2", nn.Linear(5, 3, bias=False))]
    return nn.Sequential(OrderedDict(parts))


def shaken(model: nn.Module) -> nn.Module:
    """The model with every trainable parameter moved away from its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def trained(**wanted) -> nn.Module:
    return shaken(
        inject(small(), **{"r": 2, "lora_alpha": 3, "target_modules": ["fc1"], "modules_to_save": ["fc2"]} | wanted)
    )


def state(model: nn.Module) -> dict:
    return {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name][:2] == b[name][:2] and torch.equal(a[name][2], b[name][2]) for name in a
    )


def rewrite(directory: Path, change) -> None:
    """Apply `change(header, data)` to a weights file; both may be changed in place or returned anew."""
    path = directory / WEIGHTS_NAME
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    header["__metadata__"].pop("sha256", None)
    header, data = change(header, data) or (header, data)
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def configure(directory: Path, **settings) -> None:
    path = directory / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


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
        library = pytest.importorskip("safetensors.torch")
        model = load_adapter(small(), saved)
        tensors = library.load_file(saved / WEIGHTS_NAME)
        assert set(tensors) == {
            "base_model.model.fc1.lora_A.weight",
            "base_model.model.fc1.lora_B.weight",
            "base_model.model.fc2.weight",
        }
        assert torch.equal(tensors["base_model.model.fc1.lora_A.weight"], model.fc1.lora_A)
        library.save_file(tensors, saved / WEIGHTS_NAME, metadata={"format": "pt"})
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
        assert other.fastlora_config == model.fastlora_config

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

    @pytest.mark.parametrize("failing", range(2))
    def test_a_full_disk_leaves_the_old_adapter(self, saved, monkeypatch, failing):
        before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}
        calls = []

        def full(file):
            calls.append(file)
            if len(calls) > failing:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(adapter_files, "_flush", full)
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
            if moment == "unlink" and path.name == CONFIG_NAME:
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


def refused(directory: Path, model: nn.Module | None = None) -> str:
    """Load into a bare and into an injected model: refused in one line, and both unchanged. Gives the message."""
    given = [model] if model is not None else [small(), trained()]
    for target in given:
        before, recorded = state(target), getattr(target, "fastlora_config", None)
        with pytest.raises(AdapterError) as caught:
            load_adapter(target, directory)
        assert same(state(target), before) and getattr(target, "fastlora_config", None) == recorded
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    return str(caught.value)


A = "base_model.model.fc1.lora_A.weight"


class TestStrangersWeights:
    def test_missing_files(self, saved, tmp_path):
        assert "missing" in refused(tmp_path / "nowhere")
        (saved / WEIGHTS_NAME).unlink()
        assert WEIGHTS_NAME in refused(saved)
        (saved / WEIGHTS_NAME).mkdir()
        assert "not a file" in refused(saved)

    def test_a_pipe_is_not_waited_for(self, saved):
        (saved / WEIGHTS_NAME).unlink()
        os.mkfifo(saved / WEIGHTS_NAME)
        assert "not a file" in refused(saved)

    def test_links_are_followed(self, saved, tmp_path):
        (saved / WEIGHTS_NAME).rename(tmp_path / "blob")
        (saved / WEIGHTS_NAME).symlink_to(tmp_path / "blob")
        load_adapter(small(), saved)

    def test_truncated_anywhere(self, saved):
        whole = (saved / WEIGHTS_NAME).read_bytes()
        for length in [*range(0, 64), *range(64, len(whole), 7), len(whole) - 1]:
            (saved / WEIGHTS_NAME).write_bytes(whole[:length])
            assert "damaged" in refused(saved, small())
        (saved / WEIGHTS_NAME).write_bytes(whole + b"\0")
        assert "damaged" in refused(saved)

    def test_any_bit_flipped_is_refused_or_harmless(self, saved):
        whole = (saved / WEIGHTS_NAME).read_bytes()
        expected = load_adapter(small(), saved).eval()(IDS)
        untouched, target = small(), small()
        header = 8 + int.from_bytes(whole[:8], "little")
        draw = random.Random(0)
        count = 0
        for place in [*range(header), *range(header, len(whole), 5)]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            (saved / WEIGHTS_NAME).write_bytes(flipped)
            try:
                loaded = load_adapter(target, saved)
            except AdapterError as error:
                assert "\n" not in str(error)
                count += 1
            else:  # a flip that JSON or the metadata does not mind
                assert place < header and torch.equal(loaded.eval()(IDS), expected)
                target = small()
        assert same_values(target, untouched) and count > 0.8 * header

    def test_a_gigantic_header_is_not_read(self, saved):
        path = saved / WEIGHTS_NAME
        for length in (2**63, 2**40, 2**64 - 1, 10**6):
            path.write_bytes(struct.pack("<Q", length) + b"{}")
            assert "header" in refused(saved, small())
        with open(path, "wb") as file:  # sparse: its size is as large as it claims, and nothing of it is read
            file.write(struct.pack("<Q", 2**34))
            file.truncate(2**34 + 8)
        assert "header of 17179869184 bytes" in refused(saved, small())

    def test_gigantic_tensors_are_not_read(self, saved):
        def huge(header, data):
            header[A]["shape"] = [2**20, 2**20]
            header[A]["data_offsets"] = [len(data), len(data) + 2**42]

        rewrite(saved, huge)
        assert "damaged" in refused(saved)

        def many_zero(header, data):
            header[A]["shape"] = [0, 2**60]
            header[A]["data_offsets"] = [0, 0]

        rewrite(saved, many_zero)
        assert "damaged" in refused(saved)

    @pytest.mark.parametrize(
        "text",
        [b"", b"[]", b"null", b'{"a"', b"\xff\xfe", b"[" * 200_000, b'{"a":NaN}', b'{"a":1}', b'{"a":{"dtype":"F32"}}'],
    )
    def test_headers_that_are_none(self, saved, text):
        rewrite(saved, lambda header, data: (text, data))
        assert "damaged" in refused(saved)

    @pytest.mark.parametrize(
        ("entry", "why"),
        [
            ({"dtype": "F8_E4M3"}, "unsupported dtype"),
            ({"dtype": ["F32"]}, "unsupported dtype"),
            ({"dtype": "F16"}, "disagree"),
            ({"dtype": "I32"}, "not floating point"),
            ({"shape": [2.0, 6]}, "disagree"),
            ({"shape": [True, 12]}, "disagree"),
            ({"shape": [-2, -6]}, "disagree"),
            ({"shape": "26"}, "disagree"),
            ({"shape": 12}, "malformed"),
            ({"shape": [1] * 9}, "disagree"),
            ({"shape": [6, 2]}, "has shape"),
            ({"shape": [12]}, "has shape"),
            ({"data_offsets": [0]}, "malformed"),
            ({"data_offsets": [48, 0]}, "disagree"),
            ({"data_offsets": [-48, 0]}, "disagree"),
            ({"data_offsets": [4, 52]}, "overlap"),
        ],
    )
    def test_entries_that_lie(self, saved, entry, why):
        rewrite(saved, lambda header, data: header[A].update(entry))
        assert why in refused(saved)

    def test_names(self, saved):
        whole = (saved / WEIGHTS_NAME).read_bytes()
        for name in ("../../etc/passwd", "/tmp/x", "fc1.lora_A.weight", "", "a\nb\x1b[31m", "x" * 100_000, A + "\0"):
            rewrite(saved, lambda header, data, name=name: header.update({name: header.pop(A)}))
            message = refused(saved)
            assert "lora_A.weight' is missing" in message
            (saved / WEIGHTS_NAME).write_bytes(whole)

            def more(header, data, name=name):
                header[name] = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}

            rewrite(saved, more)
            assert "has no place" in refused(saved)
            (saved / WEIGHTS_NAME).write_bytes(whole)

    def test_a_name_given_twice(self, saved):
        def twice(header, data):
            text = json.dumps(header)
            return (text[:-1] + f', "{A}": {json.dumps(header[A])}' + "}").encode(), data

        rewrite(saved, twice)
        assert "given twice" in refused(saved)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_numbers_that_are_not_finite(self, saved, value):
        rewrite(saved, lambda header, data: struct.pack_into("<f", data, header[A]["data_offsets"][0] + 8, value))
        message = refused(saved)
        assert A in message and "not finite" in message

    def test_another_rank_shape_or_layer(self, saved):
        assert "the adapter has rank 2 at fc1, the model has rank 4" in refused(saved, trained(r=4))
        configure(saved, r=4)
        assert "has shape (2, 6), the model needs (4, 6)" in refused(saved, small())
        configure(saved, r=2)
        wider = nn.Sequential()
        for name, part in small().named_children():
            wider.add_module(name, nn.Linear(6, 7) if name == "fc1" else part)
        assert "(5, 2), the model needs (7, 2)" in refused(saved, wider)
        assert "matches no module" in refused(saved, nn.Sequential(nn.Linear(2, 2)))
        assert "is missing" in refused(saved, inject(small(), r=2, target_modules=["fc1", "fc2"]))

    def test_dtypes_that_would_lose_numbers(self, saved):
        half = inject(small().half(), r=2, target_modules=["fc1"])
        assert "cannot hold exactly" in refused(saved, half)
        wide = load_adapter(small().half(), saved)  # a new layer keeps float32
        assert wide.fc1.lora_A.dtype == torch.float32 and wide.fc2.weight.dtype == torch.float16

    def test_numbers_too_large_for_the_model(self, saved):
        def large(header, data):
            struct.pack_into("<f", data, header["base_model.model.fc2.weight"]["data_offsets"][0], 1e6)

        rewrite(saved, large)
        assert "too large" in refused(saved, small().half())

    def test_a_model_without_memory(self, saved):
        with pytest.raises(ValueError, match="meta device"):
            load_adapter(small().to("meta"), saved)


def same_values(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestStrangersConfig:
    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"peft_type": None}, "only LORA"),
            ({"peft_type": ["LORA"]}, "only LORA"),
            ({"use_dora": True}, "DoRA"),
            ({"lora_bias": True}, "lora_bias"),
            ({"bias": "all"}, "trains biases"),
            ({"layers_to_transform": [0]}, "by index"),
            ({"layer_replication": [[0, 1]]}, "replicated"),
            ({"target_parameters": ["x"]}, "single parameters"),
            ({"trainable_token_indices": [1]}, "token"),
            ({"alora_invocation_tokens": [1]}, "activated"),
            ({"init_lora_weights": "pissa"}, "changed base weight"),
            ({"init_lora_weights": "loftq"}, "changed base weight"),
            ({"init_lora_weights": ["x"]}, "changed base weight"),
            ({"r": 0}, "r must"),
            ({"r": "2"}, "r must"),
            ({"r": True}, "r must"),
            ({"r": 2**70}, "model"),
            ({"lora_alpha": "x"}, "lora_alpha"),
            ({"lora_alpha": 10**400}, "lora_alpha"),
            ({"lora_dropout": 1.0}, "lora_dropout"),
            ({"lora_dropout": -1}, "lora_dropout"),
            ({"use_rslora": 1}, "use_rslora"),
            ({"target_modules": None}, "names no module"),
            ({"target_modules": []}, "names no module"),
            ({"target_modules": [1]}, "target_modules"),
            ({"target_modules": {"a": 1}}, "target_modules"),
            ({"target_modules": "("}, "not valid"),
            ({"target_modules": "(a)\\1"}, "groupref"),
            ({"target_modules": "(?i)fc1"}, "flags"),
            ({"target_modules": "(" * 30 + "a" + ")*" * 30}, "deep nesting"),
            ({"target_modules": "(?<=x)fc1"}, "not run from a file"),
            ({"exclude_modules": "(a)\\1"}, "groupref"),
            ({"modules_to_save": "fc2"}, "modules_to_save"),
            ({"modules_to_save": ["../x"]}, "model"),
            ({"rank_pattern": {"(x)\\1": 3}}, "groupref"),
            ({"rank_pattern": {"fc1": 0}}, "rank_pattern"),
            ({"rank_pattern": {f"a{i}": 1 for i in range(3000)}}, "rank_pattern"),
            ({"alpha_pattern": {"fc1": "x"}}, "alpha_pattern"),
            ({"alpha_pattern": {"(a": 1}}, "not valid"),
            ({"task_type": "NONE"}, "task_type"),
            ({"task_type": {}}, "task_type"),
        ],
    )
    def test_settings(self, saved, settings, why):
        configure(saved, **settings)
        assert why in refused(saved)

    @pytest.mark.parametrize(
        "text", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000, b'{"r": NaN}', b'{"r":1,"r":2}']
    )
    def test_what_is_no_json(self, saved, text):
        (saved / CONFIG_NAME).write_bytes(text)
        assert "damaged" in refused(saved)

    def test_a_gigantic_one_is_not_read(self, saved):
        with open(saved / CONFIG_NAME, "wb") as file:
            file.truncate(2**34)
        assert "17179869184 bytes" in refused(saved)

    def test_a_setting_nobody_knows_is_said(self, saved):
        configure(saved, use_magic=True, harmless=None)
        with pytest.warns(fastlora.errors.FastLoRAWarning, match="use_magic"):
            load_adapter(small(), saved)

    @pytest.mark.parametrize(
        "pattern", ["(a|a)*b", "(a*)*b", "(a?){60}" + "a" * 60, ".*" * 40 + "x", "(.*a){20}b", "((a?){99}){99}b"]
    )
    def test_patterns_that_never_end_end(self, saved, pattern):
        model = nn.ModuleDict({"a" * 120: small()})
        configure(saved, target_modules=pattern)
        refused(saved, model)

    def test_defaults_are_pefts(self):
        config = from_json({"peft_type": "LORA", "target_modules": ["a"]}, "x")
        assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)


def distilbert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


PAIRS = [
    (distilbert, {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}),
    (
        distilbert,
        {"target_modules": "all-linear", "modules_to_save": ["classifier"], "exclude_modules": ["pre_classifier"]},
    ),
    (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"]}),
    (gpt2, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    (gpt2, {"target_modules": ["c_fc", "lm_head"]}),
    (
        llama,
        {
            "task_type": "CAUSAL_LM",
            "target_modules": r".*\.(q|v)_proj",
            "rank_pattern": {"layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
            "use_rslora": True,
        },
    ),
    (llama, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "wanted"), PAIRS)
class TestWithPeft:
    def test_peft_loads_ours(self, tmp_path, make, wanted):
        peft = pytest.importorskip("peft")
        model = shaken(inject(make(), r=4, lora_alpha=6, **wanted))
        save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}
        found = {
            n for n, layer in theirs.base_model.model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
        assert found == set(layers)
        for name, layer in layers.items():
            other = theirs.base_model.model.get_submodule(name)
            assert torch.equal(other.lora_A["default"].weight, layer.lora_A)
            assert torch.equal(other.lora_B["default"].weight, layer.lora_B)
            assert other.scaling["default"] == layer.scaling
        written = {key for key in adapter_entries(tmp_path) if ".lora_" not in key}
        kept = peft.get_peft_model_state_dict(theirs)
        for key in written:
            assert torch.equal(kept[key], model.state_dict()[key.removeprefix("base_model.model.")])
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=2e-6)

    def test_we_load_pefts(self, tmp_path, make, wanted):
        peft = pytest.importorskip("peft")
        given = copy.deepcopy(wanted)
        theirs = shaken(peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **given)))
        theirs.save_pretrained(tmp_path / "theirs")
        model = load_adapter(make(), tmp_path / "theirs").eval()
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=2e-6)
        save_adapter(model, tmp_path / "ours")
        ours, original = adapter_entries(tmp_path / "ours"), adapter_entries(tmp_path / "theirs")
        assert set(original) - set(ours) <= {"base_model.model.lm_head.base_layer.weight"}
        assert all(torch.equal(ours[key], original[key]) for key in ours)
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def adapter_entries(directory: Path) -> dict[str, torch.Tensor]:
    return pytest.importorskip("safetensors.torch").load_file(directory / WEIGHTS_NAME)


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_head_that_peft_saved_with_another_base_weight(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in adapter_entries(tmp_path)
    load_adapter(llama(), tmp_path)
    other = llama()
    nn.init.zeros_(other.lm_head.weight)
    assert "another base weight" in refused(tmp_path, other)


@pytest.mark.filterwarnings("ignore")
def test_pefts_float32_adapters_over_a_16_bit_base(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = shaken(peft.get_peft_model(gpt2().bfloat16(), peft.LoraConfig(r=4, target_modules=["c_attn"])))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(gpt2().bfloat16(), tmp_path)
    for key, value in adapter_entries(tmp_path).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(model.get_parameter(name), value) and value.dtype == torch.float32
