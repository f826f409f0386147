"""Training runs in a hostile place, by the real command line in real processes: one clear line, or the same final bits.

    python -m tests.campaigns.runs --tries 10 --seed 1

A disk that is full (a small tmpfs, where we may mount one; else a limit on file sizes), a read-only folder, two runs in
one output folder, a cache shared by eight processes. Kills at random moments are `python tests/finetune/killed.py 50`;
downloads that are cut, slowed, corrupted or replaced are `python -m tests.campaigns.downloads`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = ["train", "imdb", "--data", "sample", "--epochs", "2", "--device", "cpu", "--train-samples", "200",
       "--test-samples", "50", "--output"]  # fmt: skip
TENSORS = ("adapter_model.safetensors", "model.safetensors")
KEPT = ("adapter_config.json", "vocabulary.json")


def start(output: Path, cache: Path, *more: str, limit: int | None = None) -> subprocess.Popen:
    """A training run into `output`; `limit` bounds the size of each file that it writes."""

    def bound() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = os.environ | {"FASTLORA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "fastlora", *RUN, str(output), *more], env=environment, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            preexec_fn=bound if limit is not None else None)  # fmt: skip


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit status, what the user was told); the bar's lines left out."""
    _, told = process.communicate(timeout=600)
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.startswith("fastlora:") or "Error" in line]
    return process.returncode, "\n".join(lines)


def bits(run: Path) -> dict[str, bytes]:
    """What a finished run leaves that its seed decides; the model's file holds a time beside its tensors."""
    from safetensors.numpy import load_file

    model = {name: a.tobytes() for file in TENSORS for name, a in load_file(run / file).items()}
    return model | {name: (run / name).read_bytes() for name in KEPT}


def explained(status: int, told: str, statuses: tuple[int, ...], words: str) -> str | None:
    """None when a run ended with one of `statuses` and one line with `words` in it; else what it did."""
    fine = status in statuses and told.count("\n") == 0 and told.startswith("fastlora:") and words in told
    return None if fine else f"status {status}: {told[-300:]}"


@contextlib.contextmanager
def small_disk(folder: Path, size: int, options: str = "") -> Iterator[Path | None]:
    """A file system of `size` bytes at `folder`, or None where we may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: Path, cache: Path, whole: dict, rng: random.Random) -> tuple[str, str | None]:
    """The disk fills up somewhere in the run; with room made, --resume ends with the same bits."""
    total = sum(map(len, whole.values()))
    size = rng.randrange(4096, total)
    with small_disk(folder / "disk", size) as disk:
        output = (disk or folder) / "run"
        wrong = explained(*end(start(output, cache, limit=None if disk else size // 2)), (1, 2), "disk is full")
        if wrong is None and disk is not None:
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        if wrong is None:
            status, told = end(start(output, cache, "--resume"))
            wrong = told if status or bits(output) != whole else None
        leftover = [path.name for path in output.glob(".*.part")] if output.is_dir() else []
    return f"a disk of {size} bytes", wrong or (f"left {leftover}" if leftover else None)


def read_only(folder: Path, cache: Path, whole: dict, rng: random.Random) -> tuple[str, str | None]:
    """An output folder on a read-only file system."""
    with small_disk(folder / "disk", 1 << 20, ",ro") as disk:
        if disk is None:
            return "a read-only disk (not mounted here, not tried)", None
        return "a read-only disk", explained(*end(start(disk / "run", cache)), (1, 2), "ead-only")


def two_runs(folder: Path, cache: Path, whole: dict, rng: random.Random) -> tuple[str, str | None]:
    """Two runs started into one folder: one ends as if alone, the other says why it does not run."""
    first = start(folder / "run", cache)
    time.sleep(rng.uniform(0, 3))
    second = start(folder / "run", cache)
    ended = sorted((end(first), end(second)))
    wrong = None if ended[0][0] == 0 and bits(folder / "run") == whole else f"{ended}"
    return "two runs in one folder", wrong or explained(*ended[1], (2,), str(folder / "run"))


def shared_cache(folder: Path, cache: Path, whole: dict, rng: random.Random) -> tuple[str, str | None]:
    """Eight processes that find the cache empty make its data and its word vectors at once."""
    runs = [start(folder / f"run-{i}", folder / "cache") for i in range(8)]
    ended = [end(run) for run in runs]
    same = all(status == 0 for status, _ in ended) and all(bits(folder / f"run-{i}") == whole for i in range(8))
    left = [path.name for path in (folder / "cache").rglob(".*.part")]
    return "a cache shared by eight", None if same and not left else f"{ended} {left}"


HARDSHIPS = {"full_disk": full_disk, "read_only": read_only, "two_runs": two_runs, "shared_cache": shared_cache}


def campaign(names: list[str], tries: int, seed: int) -> list[str]:
    """The faults seen in `tries` tries of each hardship (one of the shared cache)."""
    rng, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as base:
        base, cache = Path(base), Path(base) / "cache"
        status, told = end(start(base / "whole", cache))
        if status:
            return [f"the run fails by itself: {told}"]
        whole = bits(base / "whole")
        for name in names:
            for i in range(1 if name in ("shared_cache", "read_only") else tries):
                folder = base / f"{name}-{i}"
                folder.mkdir()
                what, wrong = HARDSHIPS[name](folder, cache, whole, rng)
                print(f"{what}: {wrong or 'as promised'}", flush=True)
                found += [f"{what}: {wrong}"] if wrong else []
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.runs", description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=tuple(HARDSHIPS), action="append")
    args = parser.parse_args(argv)
    found = campaign(args.only or list(HARDSHIPS), args.tries, args.seed)
    print(f"seed {args.seed}: {len(found)} wrong")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
