"""Models of transformers and adapters of PEFT as `fastlora train distilbert` loads them; what is damaged is refused.

Weights are safetensors, no code out of a model's folder is run, and no number that it lacks is made up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging

from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, as_held, read_config, read_tensors, write_adapter
from fastlora.env import expanded
from fastlora.errors import UserError, shown
from fastlora.files import open_regular, read_regular
from fastlora.targets import TASK_HEADS

LABELS = ("negative", "positive")
HEADS = TASK_HEADS["SEQ_CLS"]  # ends of the names of what PEFT trains in full
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_TEXT = 256 << 20  # bytes of config.json, an index or a tokenizer's file
FLOATS = ("F64", "F32", "F16", "BF16")
NOTES = ("transformers_version", "_name_or_path", "architectures")  # settings that no computation depends on


def located(name: str, what: str) -> str:
    """`name`, as an absolute path if it is a folder's, else as it is: a hub name; `what` names it in errors."""
    folder = expanded(name)
    if folder.is_dir():
        return str(folder.resolve())
    if not name.strip() or name.startswith(("/", ".", "~")):
        raise UserError(f"{what}: no such folder")
    return name


def load_config(name: str, what: str):
    """The configuration of model `name` (see `located`); UserError when it is not to be had or not supported."""
    with refused(what):
        for key, value in _settings(name).items():
            # another attention may be code to be fetched
            foreign = key.endswith("attn_implementation") and value not in ("eager", "sdpa")
            if value is not None and (foreign or key in ("quantization_config", "transformers_weights")):
                raise UserError(f"{what}: config.json has {key} = {shown(value)}, which is not supported")
        if _file(name, CONFIG_NAME):  # transformers would turn to the model that it names
            raise UserError(f"{what}: holds an adapter ({CONFIG_NAME}); a whole model is needed")
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_model(name: str, what: str) -> tuple:
    """(tokenizer, classifier with two labels) of model `name` (see `located`); `what` names it in errors.

    Raises:
        UserError: it is not to be had or damaged, lacks a weight that is not trained, needs code of its own, or its
            tokenizer cannot pad or knows no word.
    """
    labels = dict(enumerate(LABELS))
    config, kinds = load_config(name, what), {}
    with refused(what):
        for path in _weight_files(name, what):
            with safe_open(path, "pt") as file:
                kinds |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
        layers = getattr(config, "num_hidden_layers", None) or 0
        if layers > len(kinds):
            raise UserError(f"{what}: config.json has {layers} layers, and the weights are {len(kinds)} tensors")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(LABELS), id2label=labels, label2id={label: i for i, label in labels.items()},
            problem_type="single_label_classification", trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        for key in sorted(info["missing_keys"]):
            if not any(part.endswith(HEADS) for part in key.split(".")[:-1]):
                raise UserError(f"{what}: its weights lack {shown(key)}")
        prefix = f"{model.base_model_prefix}."  # a file may have been written with it or without
        kinds = {key.removeprefix(prefix): kind for key, kind in kinds.items()}
        for key, parameter in model.named_parameters():
            if kinds.get(key.removeprefix(prefix), "F32") not in FLOATS or not parameter.isfinite().all():
                raise UserError(f"{what}: its weight {shown(key)} holds numbers that are not finite floats")
        if tokenizer.pad_token is None:
            raise UserError(f"{what}: its tokenizer has no padding token")
        words = tokenizer("the film was good", add_special_tokens=False)["input_ids"]
        if set(words) <= {tokenizer.unk_token_id}:
            raise UserError(f"{what}: its tokenizer knows no word; are the tokenizer's files there?")
        if max(tokenizer.get_vocab().values()) >= model.get_input_embeddings().num_embeddings:
            raise UserError(f"{what}: its tokenizer has more words than the model")
        if model.config.pad_token_id is None:  # decoders look for a row's last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def digest(name: str, tokenizer, what: str) -> str:
    """The sha256 of what a model computes with: its configuration, weights and words."""
    with refused(what):
        config = {key: value for key, value in _settings(name).items() if key not in NOTES}
        summed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for path in _weight_files(name, what):
            with open_regular(path) as file:
                while part := file.read(1 << 20):
                    summed.update(part)
        summed.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        return summed.hexdigest()


def longest(config) -> int:
    """The most tokens that a text may have for a model of this configuration."""
    most = getattr(config, "max_position_embeddings", None)
    return most if type(most) is int and most > 0 else 65536


def readable(text: str, max_length: int) -> str:
    """What of a text is read: no lone surrogates, and not much more than `max_length` tokens could come from."""
    return text[: min(1000 * max_length, 1 << 22)].encode("utf-8", "replace").decode()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter to `folder` as PEFT's `save_pretrained` does, but each file whole and without a README.md."""
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    write_adapter(folder, settings, get_peft_model_state_dict(model, save_embedding_layers=False))


def load_adapter(model: PreTrainedModel, run: Path) -> PeftModel:
    """`model` with the adapter that `save_adapter` left in folder `run`; UserError when it is damaged or another's."""
    config = read_config(run)
    if isinstance(config.target_modules, str) or config.task_type != "SEQ_CLS":
        raise UserError(f"{run / CONFIG_NAME}: not an adapter of this program")
    with refused(f"{run}: the adapter"):
        model = get_peft_model(model, LoraConfig(
            task_type=TaskType.SEQ_CLS, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora, target_modules=list(config.target_modules)))  # fmt: skip
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = read_tensors(run, {name: tuple(tensor.shape) for name, tensor in held.items()})
    tensors = {name: as_held(run / WEIGHTS_NAME, name, tensor, held[name]) for name, tensor in tensors.items()}
    set_peft_model_state_dict(model, tensors)
    return model


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars and its report of weights that the adapter brings."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever a library raises for a bad file becomes a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be loaded ({shown(textwrap.shorten(str(error), 190))})") from None


def _settings(name: str) -> dict:
    return json.loads(read_regular(cached_file(name, "config.json"), MAX_TEXT))


def _weight_files(name: str, what: str) -> list[str]:
    """The paths of a model's safetensors files; UserError where there is none, or one in another folder."""
    if whole := _file(name, WEIGHTS):
        return [whole]
    index = _file(name, INDEX)
    if index is None:
        raise UserError(f"{what}: holds no {WEIGHTS}; weights in other formats, pickles, are not loaded")
    parts = sorted(set(json.loads(read_regular(index, MAX_TEXT))["weight_map"].values()))
    for part in parts:
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise UserError(f"{what}: its {INDEX} names {shown(part)}, which is no safetensors file beside it")
    return [cached_file(name, part) for part in parts]


def _file(name: str, file: str) -> str | None:
    """The path of a model's file, fetched if need be; None where there is none, or none that can be reached."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)  # fmt: skip
