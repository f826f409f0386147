"""Models of transformers and adapters of PEFT as `fastlora train distilbert` loads them; what is damaged is refused."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from fastlora.errors import UserError

LABELS = ("negative", "positive")


def load_config(name: str, what: str):
    """The configuration of model `name`, a folder or a hub name; `what` names it in errors."""
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"{what}: no such folder")
    with _refused(what):
        return AutoConfig.from_pretrained(name)


def load_model(name: str, what: str):
    """(tokenizer, classifier with two labels) of model `name`; `what` names it in errors.

    Raises:
        UserError: it is not to be had or damaged, or its tokenizer cannot pad or knows no word.
    """
    labels = dict(enumerate(LABELS))
    load_config(name, what)
    with _refused(what):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(LABELS), id2label=labels, label2id={label: i for i, label in labels.items()}
        )
    if tokenizer.pad_token is None:
        raise UserError(f"{what}: its tokenizer has no padding token")
    if set(tokenizer("the film was good", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise UserError(f"{what}: its tokenizer knows no word; are the tokenizer's files there?")
    if model.config.pad_token_id is None:  # decoders look for a row's last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def load_adapter(model: PreTrainedModel, run: Path) -> PeftModel:
    """`model` with the adapter that `save_pretrained` left in folder `run`.

    Raises:
        UserError: the adapter is damaged, incomplete, another model's, or holds numbers that are not finite.
    """
    what = f"{run}: the adapter"
    with _refused(what):
        weights = load_peft_weights(str(run), device="cpu")
        model = get_peft_model(model, PeftConfig.from_pretrained(str(run)))
        wanted = get_peft_model_state_dict(model)
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            raise UserError(f"{what} {'lacks' if name in wanted else 'holds the unknown'} {name}")
        if weights[name].shape != wanted[name].shape:
            raise UserError(f"{what} has {name} of {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{what} holds numbers that are not finite, in {name}")
    set_peft_model_state_dict(model, weights)
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


def shortened(error: Exception) -> str:
    """What a library says, on one line."""
    return textwrap.shorten(str(error), 320, placeholder=" ...")


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:  # theirs for bad files
        raise UserError(f"{what} cannot be loaded ({shortened(error)})") from None
