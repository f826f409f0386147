"""The command line: train, predict, prepare, info. Exit status 0 done, 1 the work failed, 2 the user's mistake."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastlora import env
from fastlora._version import __version__
from fastlora.errors import UserError, WorkError

PROGRAMS = {
    "imdb": ("fastlora.finetune.imdb", "sentiment of film reviews, on mean word vectors"),
    "spam": ("fastlora.finetune.spam", "SMS spam, with GPT-2"),
    "distilbert": ("fastlora.finetune.distilbert", "sentiment of film reviews, with DistilBERT and PEFT"),
}
PREPARE = ("fastlora.finetune.prepare", "a raw SMSSpamCollection file to the balanced split that train reads")
EXTRAS = {"pandas": "train", "pyarrow": "train", "tiktoken": "train", "tqdm": "train", "matplotlib": "train",
          "peft": "peft", "transformers": "peft", "accelerate": "peft"}
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help tells more)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return _say("interrupted; what was written whole is kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left
        sys.stderr.close()
        return FAILED
    except UserError as error:
        return _say(error, MISTAKE)
    except WorkError as error:
        return _say(error, FAILED)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _say(f'{package} is not installed: pip install "fastlora-kernels[{EXTRAS[package]}]"', MISTAKE)
    except OSError as error:
        from fastlora.finetune.files import explain_os_error

        return _say(explain_os_error(error), FAILED)
    except MemoryError:
        return _say("out of memory", FAILED)


def _say(message: object, status: int) -> int:
    print("fastlora:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    return status


def _run(argv: list[str]) -> int:
    parser = Parser(prog="fastlora", description="LoRA fine-tuning with the fused linear layer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|predict|prepare|info")
    _train_parsers(commands.add_parser("train", help="fine-tune a model"), argv)
    predict = commands.add_parser("predict", help="label texts with a finished run")
    predict.add_argument("run", type=Path, help="the run's folder")
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
    from fastlora.dispatch import check, registry
    from fastlora.finetune.options import pick_device

    if path not in registry.NAMES:
        raise UserError(f"FASTLORA_PATH is {path!r}; it needs to be one of {', '.join(registry.NAMES)}, or unset")
    device = pick_device(device)
    reason = registry.load(path).unavailable(device) or check.admit(path, device)
    if reason:
        raise UserError(f"FASTLORA_PATH={path} cannot run here: {reason}")


def _train_parsers(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    programs = parser.add_subparsers(dest="program", required=True, metavar="|".join(PROGRAMS))
    for name, (module, text) in PROGRAMS.items():
        program = programs.add_parser(name, help=text, description=text)
        if argv[:2] == ["train", name]:  # only the program asked for is imported
            from fastlora.finetune.options import add_shared

            add_shared(program)
            importlib.import_module(module).add_arguments(program)


def _predict(run: Path, texts: list[str]) -> None:
    from fastlora.finetune.report import read_report

    task = read_report(run)["task"]
    if task not in PROGRAMS:
        raise UserError(f"{run}: a run of the unknown task {task!r}")
    if "-" in texts:
        if len(texts) > 1:
            raise UserError("predict takes texts or -, not both")
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not texts:
            raise UserError("standard input holds no text")
    predict = importlib.import_module(PROGRAMS[task][0]).load_predictor(run)
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        for text, (label, probability) in zip(part, predict(part), strict=True):
            print(f"{label}\t{probability:.4f}\t{' '.join(text.split())[:100]}")
