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

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging

from fastlora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, as_held, read_config, read_tensors, write_adapter
from fastlora.env import expanded
from fastlora.errors import UserError, shown
from fastlora.files import read_regular
from fastlora.targets import TASK_HEADS

LABELS = ("negative", "positive")
MAX_TEXT = 256 << 20  # bytes of config.json
NOTES = ("transformers_version", "_name_or_path", "architectures")  # settings that no computation depends on
HEADS = TASK_HEADS["SEQ_CLS"]  # ends of the names of what PEFT trains in full


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
        if cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False):  # fmt: skip
            # transformers would turn to the model that it names
            raise UserError(f"{what}: holds an adapter ({CONFIG_NAME}); a whole model is needed")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        attention = config._attn_implementation
        if attention not in (None, "eager", "sdpa"):  # another may be code to be fetched
            raise UserError(f"{what}: config.json has attn_implementation = {shown(attention)}, which is not supported")
        return config


def load_model(name: str, what: str) -> tuple:
    """(tokenizer, classifier with two labels, digest) of model `name` (see `located`); `what` names it in errors.

    The digest is that of what it computes with: settings, weights and words.

    Raises:
        UserError: it is not to be had or damaged, lacks a weight that is not trained, needs code of its own, or its
            tokenizer cannot pad or knows no word.
    """
    load_config(name, what)
    with refused(what):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), problem_type="single_label_classification",
            label2id={label: i for i, label in enumerate(LABELS)}, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        made_up = set(info["missing_keys"])
        for key in sorted(made_up):
            if not any(part.endswith(HEADS) for part in key.split(".")[:-1]):
                raise UserError(f"{what}: its weights lack {shown(key)}")
        words = tokenizer.get_vocab()
        if tokenizer.pad_token is None:
            raise UserError(f"{what}: its tokenizer has no padding token")
        if set(tokenizer("the film was good", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
            raise UserError(f"{what}: its tokenizer knows no word; are the tokenizer's files there?")
        if max(words.values()) >= model.get_input_embeddings().num_embeddings:
            raise UserError(f"{what}: its tokenizer has more words than the model")
        if model.config.pad_token_id is None:  # decoders look for a row's last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
        settings = json.loads(read_regular(cached_file(name, "config.json"), MAX_TEXT))
    settings = {key: value for key, value in settings.items() if key not in NOTES}
    digest = hashlib.sha256(json.dumps([sorted(settings.items()), sorted(words.items())]).encode())
    for key, tensor in model.state_dict().items():
        if key not in made_up:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return tokenizer, model, digest.hexdigest()


def longest(config) -> int:
    """The most tokens that a text may have for a model of this configuration."""
    return getattr(config, "max_position_embeddings", None) or 65536


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
