"""The command line: train, predict, prepare, info. Exit status 0 done, 1 the work failed, 2 the user's mistake."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastlora import env
from fastlora._version import __version__
from fastlora.errors import UserError, WorkError, shown
from fastlora.files import FULL

PROGRAMS = {
    "imdb": ("fastlora.finetune.imdb", "sentiment of film reviews, on mean word vectors"),
    "spam": ("fastlora.finetune.spam", "SMS spam, with GPT-2"),
    "distilbert": ("fastlora.finetune.distilbert", "sentiment of film reviews, with DistilBERT and PEFT"),
}
PREPARE = ("fastlora.finetune.homes", "a raw SMSSpamCollection file to the balanced split that train reads")
EXTRAS = {
    "pandas": "train",
    "pyarrow": "train",
    "tiktoken": "train",
    "tqdm": "train",
    "matplotlib": "train",
    "huggingface_hub": "train",
    "peft": "peft",
    "transformers": "peft",
    "accelerate": "peft",
}
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
MAX_LINE, MAX_INPUT = 500, 100_000_000  # characters of a message, and of standard input
# what would steer a terminal, or turn its text around
_CONTROL, _SURROGATE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"), re.compile("[\ud800-\udfff]")


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help tells more)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit status."""
    try:
        if hasattr(sys.stdout, "reconfigure"):  # no text of a user's is lost for a terminal that cannot show it
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _say("interrupted; what was written whole is kept; train --resume goes on with a run", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left
        _abandon_output()
        return FAILED
    except UserError as error:
        return _say(error, MISTAKE)
    except WorkError as error:
        return _say(error, FAILED)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        return _say(f'{package} is not installed: pip install "fastlora-kernels[{extra}]", or -e ".[{extra}]" '
                    "where its source is", MISTAKE)  # fmt: skip
    except OSError as error:
        return _explain(error)
    except (MemoryError, RuntimeError) as error:
        torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
        if not (isinstance(error, MemoryError) or torchs):
            raise
        return _say("out of memory; a smaller --batch-size, or fewer runs of a --sweep, may fit", FAILED)


def _explain(error: OSError) -> int:
    try:
        if error.filename is None:  # a write's: was it standard output's?
            print(flush=True)
    except OSError as unwritten:
        _abandon_output()
        return _say(f"standard output cannot be written to ({unwritten.strerror})", FAILED)
    what = error.strerror or error
    if error.errno in FULL:
        what = "the disk is full; what was written whole before is kept (make room, then run again with --resume)"
    named_wrongly = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)  # only users choose such names
    return _say(f"{error.filename}: {what}" if error.filename else what, MISTAKE if named_wrongly else FAILED)


def _abandon_output() -> None:
    """Let what still waits for standard output go nowhere: Python would try, and complain, once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say(message: object, status: int) -> int:
    text = _plain(str(message))
    if len(text) > MAX_LINE:  # it begins with a name and ends with what to do
        text = f"{text[: MAX_LINE - 180]} ... {text[-175:]}"
    print("fastlora:", text, file=sys.stderr, flush=True)
    return status


def _plain(text: str) -> str:
    """`text` on one line, control characters escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), " ".join(text.split()))


def _run(argv: list[str]) -> int:
    parser = Parser(prog="fastlora", description="LoRA fine-tuning with the fused linear layer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|predict|prepare|info")
    _train_parsers(commands.add_parser("train", help="fine-tune a model"), argv)
    predict = commands.add_parser("predict", help="label texts with a finished run")
    predict.add_argument("run", help="the run's folder")
    predict.add_argument("text", nargs="+", help="texts to label; - reads one a line from standard input")
    prepare = commands.add_parser("prepare", help="turn raw data into the files that train reads")
    spam = prepare.add_subparsers(dest="what", required=True, metavar="spam").add_parser("spam", help=PREPARE[1])
    if argv[:2] == ["prepare", "spam"]:
        importlib.import_module(PREPARE[0]).add_arguments(spam)
    commands.add_parser("info", help="versions, devices, paths usable here, data found")

    parser.add_argument("--version", action="version", version=f"fastlora {__version__}")

    args = parser.parse_args(argv)
    if args.command in ("train", "predict"):
        _check_forced_path(getattr(args, "device", "cpu"))
    if args.command == "train":
        importlib.import_module(PROGRAMS[args.program][0]).train(args)
    elif args.command == "predict":
        _predict(args.run, args.text)
    elif args.command == "prepare":
        importlib.import_module(PREPARE[0]).main(args)
    else:
        from fastlora.info import info

        print(info())
    return DONE


def _check_forced_path(device: str) -> None:
    """Name a FASTLORA_PATH that cannot run before any work is done."""
    path = env.forced_path()
    if path is None:
        return
    from fastlora.choice import why_not
    from fastlora.finetune.options import pick_device

    try:
        reason = why_not(path, pick_device(device))
    except ValueError as error:
        raise UserError(str(error)) from None
    if reason:
        raise UserError(f"FASTLORA_PATH={path} cannot run here: {reason}")


def _train_parsers(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    programs = parser.add_subparsers(dest="program", required=True, metavar="|".join(PROGRAMS))
    for name, (module, text) in PROGRAMS.items():
        program = programs.add_parser(name, help=text, description=text)
        if argv[:2] == ["train", name]:  # only the program asked for is imported
            importlib.import_module(module).add_arguments(program)


def _predict(folder: str, texts: list[str]) -> None:
    from fastlora.finetune.run import read_report

    if not folder:
        raise UserError("the name of the run's folder is empty")
    run = Path(folder)
    task = read_report(run)["task"]
    if task not in PROGRAMS:
        raise UserError(f"{run}: a run of the unknown task {shown(task)}")
    if "-" in texts:
        if len(texts) > 1:
            raise UserError("predict takes texts or -, not both")
        texts = _standard_input()
    # bytes of an argument that are no UTF-8 came as lone surrogates, which no tokenizer takes
    texts = [_SURROGATE.sub("\ufffd", text) for text in texts]
    predict = importlib.import_module(PROGRAMS[task][0]).load_predictor(run)
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        for text, (label, probability) in zip(part, predict(part), strict=True):
            print(f"{label}\t{probability:.4f}\t{_plain(text)[:100]}")


def _standard_input() -> list[str]:
    if sys.stdin is None:
        raise UserError("standard input is closed")
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    content = sys.stdin.read(MAX_INPUT + 1)
    if len(content) > MAX_INPUT:
        raise UserError(f"standard input holds more than {MAX_INPUT} characters; give them in parts")
    texts = [line for line in content.splitlines() if line.strip()]
    if not texts:
        raise UserError("standard input holds no text")
    return texts
