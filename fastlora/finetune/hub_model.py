"""Models of transformers and adapters of PEFT as `fastlora train distilbert` loads them; what is damaged is refused.

A model's folder may be a stranger's: no code or pickle of it is run, no other folder is followed from it, and no number
that it lacks is made up.
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
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging

from fastlora.adapter_checks import as_held, check_names_and_shapes, ranks_in, read_finite
from fastlora.adapter_config import from_json
from fastlora.adapter_files import CONFIG_NAME, TensorFile, read_config, write_adapter
from fastlora.env import expanded
from fastlora.errors import UserError, shown
from fastlora.regular_files import open_regular, read_regular
from fastlora.targets import TASK_HEADS

LABELS = ("negative", "positive")
HEADS = TASK_HEADS["SEQ_CLS"]  # ends of the names of what PEFT trains in full
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG, MAX_TEXT = 4 << 20, 256 << 20  # bytes of config.json, and of a tokenizer's file
FLOATS = ("F64", "F32", "F16", "BF16")
ATTENTION = (None, "eager", "sdpa")  # others may be code to be downloaded
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
    """The configuration of model `name` (see `located`); UserError when it is not to be had or asks for too much."""
    with _refused(what):
        if Path(name).is_dir():
            _check_folder(Path(name), what)
        _check_settings(json.loads(read_regular(cached_file(name, "config.json"), MAX_CONFIG)), what)
        if _file(name, CONFIG_NAME):  # transformers would turn to the model that it names
            raise UserError(f"{what}: holds an adapter ({CONFIG_NAME}); a whole model is needed")
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_model(name: str, what: str):
    """(tokenizer, classifier with two labels) of model `name` (see `located`); `what` names it in errors.

    Raises:
        UserError: it is not to be had or damaged, lacks a weight that is not trained, needs code of its own, or its
            tokenizer cannot pad or knows no word.
    """
    config = load_config(name, what)
    labels = dict(enumerate(LABELS))
    with _refused(what):
        kinds = _dtypes(weight_files(name, what))
        layers = getattr(config, "num_hidden_layers", None) or 0
        if layers > len(kinds):
            raise UserError(f"{what}: config.json has {layers} layers, and the weights are {len(kinds)} tensors")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(LABELS), id2label=labels, label2id={label: i for i, label in labels.items()},
            problem_type="single_label_classification", trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )
        _check_weights(model, kinds, info["missing_keys"], what)
        if tokenizer.pad_token is None:
            raise UserError(f"{what}: its tokenizer has no padding token")
        words = tokenizer("the film was good", add_special_tokens=False)["input_ids"]
        if set(words) <= {tokenizer.unk_token_id}:
            raise UserError(f"{what}: its tokenizer knows no word; are the tokenizer's files there?")
        most = max(tokenizer.get_vocab().values())
        if most >= model.get_input_embeddings().num_embeddings:
            raise UserError(f"{what}: its tokenizer has {most + 1} words, more than the model")
        if model.config.pad_token_id is None:  # decoders look for a row's last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
        with torch.inference_mode():  # settings that no computation bears are found here, not in training
            model(input_ids=torch.tensor([words[:1]]), attention_mask=torch.ones(1, 1), labels=torch.tensor([0]))
    return tokenizer, model


def digest(name: str, tokenizer, what: str) -> str:
    """The sha256 of what a model computes with: its configuration, weights and words."""
    summed = hashlib.sha256()
    with _refused(what):
        config = json.loads(read_regular(cached_file(name, "config.json"), MAX_CONFIG), object_hook=_without_notes)
        summed.update(json.dumps(config, sort_keys=True).encode())
        for path in weight_files(name, what):
            with open_regular(path) as file:
                while part := file.read(1 << 20):
                    summed.update(part)
        summed.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return summed.hexdigest()


def weight_files(name: str, what: str) -> list[str]:
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
    """`model` with the adapter that `save_adapter` left in folder `run`. No regular expression out of it is run.

    Raises:
        UserError: the adapter is damaged, incomplete, another model's or program's, or holds numbers that are not
            finite.
    """
    where = run / CONFIG_NAME
    config = from_json(read_config(run), where)
    plain = not (isinstance(config.target_modules, str) or config.exclude_modules or config.rank_pattern
                 or config.alpha_pattern or set(config.modules_to_save) - set(HEADS))
    if not plain or config.task_type != "SEQ_CLS":
        raise UserError(f"{where}: not an adapter of this program")
    with TensorFile(run) as file:
        if not ranks_in(file, config):
            raise UserError(f"{file.path}: holds no adapter of rank {config.r}")
        with _refused(f"{run}: the adapter"):
            model = get_peft_model(model, LoraConfig(
                task_type=TaskType.SEQ_CLS, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora, target_modules=list(config.target_modules)))
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        check_names_and_shapes(file, {name: (tuple(tensor.shape), tensor) for name, tensor in held.items()}, {})
        file.check_sum()
        weights = {name: as_held(file.path, name, read_finite(file, name), tensor) for name, tensor in held.items()}
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
    """What a library says, on one line, control characters escaped."""
    text = textwrap.shorten(str(error), 320, placeholder=" ...")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _file(name: str, file: str) -> str | None:
    """The path of a model's file, fetched if need be; None where there is none, or none that can be reached."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def _check_folder(folder: Path, what: str) -> None:
    """UserError where transformers would wait for a pipe or read without end."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{what}: {shown(path.name)} is not a regular file")
        if path.suffix in (".json", ".txt", ".model") and path.is_file() and path.stat().st_size > MAX_TEXT:
            raise UserError(f"{what}: {shown(path.name)} has {path.stat().st_size} bytes, more than {MAX_TEXT}")


def _check_settings(settings, what: str) -> None:
    if isinstance(settings, list):
        settings = dict(enumerate(settings))
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in ("quantization_config", "transformers_weights") and value is not None:
            raise UserError(f"{what}: config.json has a {name}, which is not supported")
        if str(name).endswith("attn_implementation") and value not in ATTENTION:
            raise UserError(f"{what}: config.json asks for the attention {shown(value)}; eager and sdpa are supported")
        _check_settings(value, what)


def _dtypes(paths: list[str]) -> dict[str, str]:
    """The names of the tensors in safetensors files, and their dtypes there."""
    kinds = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return kinds


def _without_notes(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in NOTES}


def _check_weights(model: PreTrainedModel, kinds: dict[str, str], missing, what: str) -> None:
    """UserError for weights that were not there, but the head's, that are no floats, or that are not finite."""
    for name in sorted(missing):
        if not any(part.endswith(HEADS) for part in name.split(".")[:-1]):
            raise UserError(f"{what}: its weights lack {shown(name)}")
    prefix = f"{model.base_model_prefix}."  # a file may have been written with it or without
    floats = {name.removeprefix(prefix) for name, p in model.named_parameters() if p.is_floating_point()}
    for name, kind in kinds.items():  # others, like the masks `attn.bias` of older files, may be of any kind
        if kind not in FLOATS and name.removeprefix(prefix) in floats:
            raise UserError(f"{what}: its weight {shown(name)} is {kind}, not a float")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"{what}: its weight {shown(name)} holds numbers that are not finite")


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the libraries let any kind of error through for bad files
        raise UserError(f"{what} cannot be loaded ({shortened(error)})") from None
