"""Adapters from strangers: damaged, lying or hostile files are refused in one line and change nothing."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapter import IDS, A, configure, refused, rewrite, same_values, small, trained
from torch import nn

import fastlora
from fastlora import adapter_files, inject, load_adapter, save_adapter
from fastlora.adapter_config import PLAIN_KEY, alphas_of, from_json
from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterError


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(fastlora.errors, "_said", set())


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


class TestStrangersWeights:
    def test_missing_files(self, saved, tmp_path):
        assert "missing" in refused(tmp_path / "nowhere")
        (saved / WEIGHTS_NAME).unlink()
        assert WEIGHTS_NAME in refused(saved)
        (saved / WEIGHTS_NAME).mkdir()
        assert "not a regular file" in refused(saved)

    def test_a_pipe_is_not_waited_for(self, saved):
        (saved / WEIGHTS_NAME).unlink()
        os.mkfifo(saved / WEIGHTS_NAME)
        assert "not a regular file" in refused(saved)

    def test_a_file_that_memory_has_no_room_for_is_named(self, saved, monkeypatch):
        def full(*_, **__):
            raise MemoryError

        monkeypatch.setattr(adapter_files, "safe_open", full)
        assert "more than there is memory for" in refused(saved)

    def test_what_a_killed_write_leaves_bears_our_name(self, saved, monkeypatch):
        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
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
        refused(saved)

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
            ({"dtype": "F8_E4M3", "shape": [2, 24]}, "unsupported dtype"),
            ({"dtype": "C64", "shape": [1, 6]}, "unsupported dtype"),
            ({"dtype": "NONE"}, "damaged"),
            ({"dtype": ["F32"]}, "damaged"),
            ({"dtype": "F16"}, "damaged"),
            ({"dtype": "I32"}, "not floating point"),
            ({"shape": [2.0, 6]}, "damaged"),
            ({"shape": [True, 12]}, "damaged"),
            ({"shape": [-2, -6]}, "damaged"),
            ({"shape": "26"}, "damaged"),
            ({"shape": 12}, "damaged"),
            ({"shape": [1] * 9}, "damaged"),
            ({"shape": [2**62, 2**62]}, "damaged"),
            ({"shape": [6, 2]}, "has rank 6"),
            ({"shape": [12]}, "has shape"),
            ({"shape": [2, 6, 1]}, "has shape"),
            ({"data_offsets": [0]}, "damaged"),
            ({"data_offsets": [48, 0]}, "damaged"),
            ({"data_offsets": [-48, 0]}, "damaged"),
            ({"data_offsets": [4, 52]}, "damaged"),
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
            other = header[A] | {"shape": [6, 2]}
            text = json.dumps(header)
            return (text[:-1] + f', "{A}": {json.dumps(other)}' + "}").encode(), data

        rewrite(saved, twice)
        assert "has rank 6" in refused(saved)  # the last counts, and is checked

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_numbers_that_are_not_finite(self, saved, value):
        rewrite(saved, lambda header, data: struct.pack_into("<f", data, header[A]["data_offsets"][0] + 8, value))
        message = refused(saved)
        assert A in message and "not finite" in message

    def test_another_rank_shape_or_layer(self, saved):
        assert "the adapter has rank 2 at fc1, the model has rank 4" in refused(saved, trained(r=4))
        configure(saved, r=4)
        assert "has rank 2; adapter_config.json gives 4" in refused(saved, small())
        configure(saved, r=2)
        wider = nn.Sequential()
        for name, part in small().named_children():
            wider.add_module(name, nn.Linear(6, 7) if name == "fc1" else part)
        assert "(5, 2), the model needs (7, 2)" in refused(saved, wider)
        assert "matches no module" in refused(saved, nn.Sequential(nn.Linear(2, 2)))
        configure(saved, target_modules=["x" * 1000] * 1000)
        assert "matches no module" in refused(saved, nn.Sequential(nn.Linear(2, 2)))
        configure(saved, target_modules=["fc1"])
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
            ({"exclude_modules": 1}, "exclude_modules"),
            ({"modules_to_save": "fc2"}, "modules_to_save"),
            ({"modules_to_save": ["../x"]}, "model"),
            ({"rank_pattern": {"fc1": 0}}, "rank_pattern"),
            ({"rank_pattern": {f"a{i}": 1 for i in range(30_000)}}, "rank_pattern"),
            ({"alpha_pattern": {"fc1": "x"}}, "alpha_pattern"),
            ({"alpha_pattern": {"(a": 1}}, "not run"),
            ({"alpha_pattern": {"(a|a)*b": 1}}, "not run"),
            ({"alpha_pattern": {r"fc\d": 1}}, "not run"),
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

    @pytest.mark.parametrize("pattern", ["(a|a)*b", "(a?){60}" + "a" * 60, "((a?){99}){99}b", "(", "all-linear", "x"])
    @pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "rank_pattern"])
    def test_no_regular_expression_is_run(self, tmp_path, pattern, setting):
        def make():
            return nn.ModuleDict({"a" * 120: small()})

        save_adapter(inject(make(), r=2, target_modules=["fc1"]), tmp_path)
        configure(tmp_path, **{setting: {pattern: 3} if setting == "rank_pattern" else pattern})
        model = load_adapter(make(), tmp_path)
        save_adapter(model, tmp_path)  # and not when it is saved again
        assert same_values(load_adapter(make(), tmp_path), model)

    def test_keys_of_alpha(self, saved):
        for key, alpha in (("fc1", 8), ("^fc1", 8), ("^fc1$", 8), ("f.1", 8), (r"f\.1", 6), ("c1", 6), ("^c1", 6)):
            configure(saved, alpha_pattern={"nothing": 5, key: 8, "fc.": 6})
            assert load_adapter(small(), saved).fc1.scaling == alpha / 2

    def test_defaults_are_pefts(self):
        config = from_json({"peft_type": "LORA", "target_modules": ["a"]}, "x")
        assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)


@settings(max_examples=300, deadline=None)
@given(st.text(r"ab1._-^$\*", max_size=5), st.text("ab1._-", min_size=1, max_size=6))
def test_plain_keys_name_what_pefts_regular_expression_names(key, name):
    if PLAIN_KEY.fullmatch(key):
        config = from_json({"peft_type": "LORA", "target_modules": ["a"], "alpha_pattern": {key: 5}}, "x")
        assert alphas_of(config, [name]) == {name: 5 if re.match(rf"(.*\.)?({key})$", name) else 8}
