"""Models of transformers as `fastlora train distilbert` loads them; what is damaged is refused.

Weights are safetensors, no code out of a model's folder is run, and no number that it lacks is made up.
"""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

from fastlora.adapter_files import CONFIG_NAME, write_adapter
from fastlora.env import expanded
from fastlora.errors import UserError, shown
from fastlora.targets import TASK_HEADS

LABELS = ("negative", "positive")


def load_model(name: str, what: str) -> tuple:
    """(tokenizer, classifier with two labels, digest of its weights) of a folder's or hub's model; `what` in errors.

    UserError: it is not to be had or damaged, lacks a weight that is not trained, needs code of its own, or its
    tokenizer cannot pad or knows no word.
    """
    folder = expanded(name)
    if folder.is_dir():
        name = str(folder.resolve())
    elif name.startswith(("/", ".", "~")):
        raise UserError(f"{what}: no such folder")
    try:
        if cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False):  # fmt: skip
            # transformers would turn to the model that it names
            raise UserError(f"{what}: holds an adapter ({CONFIG_NAME}); a whole model is needed")
        attention = AutoConfig.from_pretrained(name, trust_remote_code=False)._attn_implementation
        if attention not in (None, "eager", "sdpa"):  # another may be code to be fetched
            raise UserError(f"{what}: config.json has attn_implementation = {shown(attention)}, which is not supported")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), problem_type="single_label_classification",
            label2id={label: i for i, label in enumerate(LABELS)}, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        made_up = set(info["missing_keys"])
        for key in sorted(made_up):
            if not any(part.endswith(TASK_HEADS["SEQ_CLS"]) for part in key.split(".")[:-1]):  # PEFT trains these
                raise UserError(f"{what}: its weights lack {shown(key)}")
        if tokenizer.pad_token is None:
            raise UserError(f"{what}: its tokenizer has no padding token")
        if set(tokenizer("the film was good", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
            raise UserError(f"{what}: its tokenizer knows no word; are the tokenizer's files there?")
        if model.config.pad_token_id is None:  # decoders look for a row's last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a library raises for a bad file
        raise UserError(f"{what} cannot be loaded ({shown(textwrap.shorten(str(error), 190))})") from None
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        if key not in made_up:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return tokenizer, model, digest.hexdigest()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter to `folder` as PEFT's `save_pretrained` does, but each file whole and without a README.md."""
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    write_adapter(folder, settings, get_peft_model_state_dict(model, save_embedding_layers=False))
