"""An adapter's files, missing, damaged, of another model or another method: refused in one line, nothing changed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from small_adapter import A, configure, refused, rewrite, small, trained
from torch import nn

import fastlora
from fastlora import inject, load_adapter, save_adapter
from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_config


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


class TestWeights:
    def test_missing_files(self, saved, tmp_path):
        assert "missing" in refused(tmp_path / "nowhere")
        (saved / WEIGHTS_NAME).unlink()
        assert WEIGHTS_NAME in refused(saved)
        (saved / WEIGHTS_NAME).mkdir()
        assert "not a regular file" in refused(saved)
        (saved / WEIGHTS_NAME).rmdir()
        os.mkfifo(saved / WEIGHTS_NAME)  # it is not waited for
        assert "not a regular file" in refused(saved)

    def test_what_a_killed_write_leaves_bears_our_name(self, saved, monkeypatch):
        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "unlink", lambda *_, **__: None)
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(trained(), saved)
        left = {path.name for path in saved.iterdir()} - {CONFIG_NAME, WEIGHTS_NAME}
        assert len(left) == 2 and all(name.startswith(".fastlora-") and name.endswith(".part") for name in left)

    def test_links_are_followed(self, saved, tmp_path):
        (saved / WEIGHTS_NAME).rename(tmp_path / "blob")
        (saved / WEIGHTS_NAME).symlink_to(tmp_path / "blob")
        load_adapter(small(), saved)

    def test_truncated_anywhere(self, saved):
        whole = (saved / WEIGHTS_NAME).read_bytes()
        for length in [*range(0, 64, 9), *range(64, len(whole), 31), len(whole) - 1]:
            (saved / WEIGHTS_NAME).write_bytes(whole[:length])
            assert "damaged" in refused(saved, small())
        (saved / WEIGHTS_NAME).write_bytes(whole + b"\0")
        assert "damaged" in refused(saved)

    @pytest.mark.parametrize(
        ("entry", "why"),
        [
            ({"dtype": "F16"}, "damaged"),
            ({"dtype": "I32"}, "not floating point"),
            ({"dtype": "C64", "shape": [1, 6]}, "has shape"),
            ({"shape": [2**62, 2**62]}, "damaged"),
            ({"shape": [6, 2]}, "(6, 2), the model needs (2, 6)"),
            ({"data_offsets": [4, 52]}, "damaged"),
        ],
    )
    def test_entries_that_lie(self, saved, entry, why):
        rewrite(saved, lambda header, data: header[A].update(entry))
        assert why in refused(saved)

    def test_names(self, saved):
        rewrite(saved, lambda header, data: header.update({"a\nb\x1b[31m": header.pop(A)}))
        assert "lora_A.weight' is missing" in refused(saved)
        save_adapter(trained(), saved)
        more = {"dtype": "U8", "shape": [0]}
        rewrite(saved, lambda header, data: header.update({"\x1b": more | {"data_offsets": [len(data)] * 2}}))
        assert "has no place" in refused(saved)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, saved, value):
        rewrite(saved, lambda header, data: struct.pack_into("<f", data, header[A]["data_offsets"][0] + 8, value))
        message = refused(saved)
        assert A in message and "not finite" in message

    def test_another_rank_shape_or_layer(self, saved):
        assert "the adapter has rank 2 at fc1, the model has rank 4" in refused(saved, trained(r=4))
        configure(saved, r=4)
        assert "(2, 6), the model needs (4, 6)" in refused(saved, small())
        configure(saved, r=2)
        wider = nn.Sequential()
        for name, part in small().named_children():
            wider.add_module(name, nn.Linear(6, 7) if name == "fc1" else part)
        assert "(5, 2), the model needs (7, 2)" in refused(saved, wider)
        assert "matches no module" in refused(saved, nn.Sequential(nn.Linear(2, 2)))
        configure(saved, modules_to_save=None, target_modules=["fc2"])
        assert "fc2.lora_A.weight' is missing" in refused(saved, small())
        configure(saved, target_modules=["fc1"])
        assert "is missing" in refused(saved, inject(small(), r=2, target_modules=["fc1", "fc2"]))
        configure(saved, target_modules="(")
        assert "does not fit the model" in refused(saved, small())

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


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"peft_type": None}, "only LORA"),
            ({"peft_type": ["LORA"]}, "only LORA"),
            ({"use_dora": True}, "use_dora=True"),
            ({"use_dora": 1}, "use_dora"),
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
            ({"exclude_modules": 1}, "exclude_modules"),
            ({"modules_to_save": "fc2"}, "modules_to_save"),
            ({"modules_to_save": ["../x"]}, "model"),
            ({"rank_pattern": {"fc1": 0}}, "rank_pattern"),
            ({"alpha_pattern": {"fc1": "x"}}, "alpha_pattern"),
            ({"alpha_pattern": {"(a": 1}}, "no regular expression"),
            ({"task_type": "NONE"}, "task_type"),
            ({"task_type": {}}, "task_type"),
        ],
    )
    def test_settings(self, saved, settings, why):
        configure(saved, **settings)
        assert why in refused(saved)

    @pytest.mark.parametrize("text", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000])
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

    def test_layers_ranks_and_alphas_are_found_as_peft_finds_them(self, saved):
        for key, alpha in (("fc1", 8), ("^fc1$", 8), (r"f\w1", 8), ("c1", 6), ("^c1", 6)):
            configure(saved, alpha_pattern={"nothing": 5, key: 8, "fc.": 6}, target_modules=r".*fc[1]")
            assert load_adapter(small(), saved).fc1.scaling == alpha / 2

    def test_defaults_are_pefts(self, tmp_path):
        (tmp_path / CONFIG_NAME).write_text('{"peft_type": "LORA", "target_modules": ["a"]}')
        config = read_config(tmp_path)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)
