"""SIGKILL a training run at random moments, resume it, and compare what it leaves with a run that was never killed.

    python tests/finetune/killed.py KILLS [--seed N] [--program spam|imdb|sweep|distilbert]

Every kill falls at a moment drawn evenly from the run's whole life; every second one is followed by another during the
resumed run. The parent imports everything once and forks, so that a kill costs no start-up.
"""

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed
import small

RUNS = {
    "spam": "train spam --data sample --model nano --epochs 2 --train-samples 400",
    "imdb": "train imdb --data sample --epochs 8",
    "sweep": "train imdb --data sample --epochs 8 --sweep lr=0.1,0.3,1",
    "distilbert": "train distilbert --data sample --epochs 3 --train-samples 120 --test-samples 20 --batch-size 16"
    " --device cpu --model",
}


def start(argv: list[str], said: Path) -> int:
    """Fork a process that runs the command line, its standard error in the file `said`; the process's number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            from fastlora.cli import main

            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = main(argv)
        finally:
            os._exit(status)
    return child


def wait(child: int, said: Path) -> None:
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"{said.read_text(errors='replace')[-2000:]}\nthe run ended with status {status}")


def campaign(kills: int, seed: int, argv: list[str], folder: Path) -> str:
    """Carry out the campaign; a line on what it saw. SystemExit when a resumed run leaves anything else."""
    draw = random.Random(seed)
    began = time.monotonic()
    said = folder / "stderr"
    wait(start([*argv, "--output", str(folder / "whole")], said), said)
    life = time.monotonic() - began
    whole = small.left(folder / "whole")
    done = with_checkpoint = 0
    trial = 0
    while done < kills:
        trial += 1
        output = folder / f"killed-{trial}"
        command = [*argv, "--output", str(output), "--resume"]
        for _ in range(1 + trial % 2):
            child = start(command, said)
            time.sleep(draw.uniform(0, life))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)  # else it had ended before
            done += killed
            with_checkpoint += killed and any(output.glob("checkpoint*"))
        wait(start(command, said), said)
        again = small.left(output)
        other = [part for part in whole if again[part] != whole[part]]
        if other:
            raise SystemExit(f"trial {trial} (seed {seed}): {other} differ from the run that was never killed")
        if list(output.glob(".*.part")):
            raise SystemExit(f"trial {trial} (seed {seed}): a half-written file stayed behind")
    return f"{done} kills in {trial} runs, {with_checkpoint} after a checkpoint: the same final bits each time"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--program", choices=tuple(RUNS), default="spam", help="a small run of it")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for module in ("matplotlib.figure", "pandas", "tqdm", "fastlora.finetune.spam", "fastlora.finetune.imdb"):
        importlib.import_module(module)
    command, hub = RUNS[args.program].split(), args.program == "distilbert"
    if hub:
        importlib.import_module("fastlora.finetune.distilbert")
    small.shrink()
    with tempfile.TemporaryDirectory() as name:
        print(f"seed {args.seed}", flush=True)
        if hub:
            command.append(str(small.hub_model(Path(name) / "model")))
        print(campaign(args.kills, args.seed, command, Path(name)))
    sys.exit(0)
