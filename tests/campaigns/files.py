"""Damaged and hostile files: each is read as what it was, or refused in one line that names it; nothing changes.

    python -m tests.campaigns.files --count 20000 --seed 1

Each loader runs in a process of its own with a bound on its memory, so that a crash or a gigantic allocation is seen.
`tests.campaigns.fuzz_loaders` looks for such files by coverage.
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
import warnings
from pathlib import Path

from fastlora.errors import UserError

from .loaders import LOADERS, Loader, damaged

ROOM = 2 << 30  # bytes of address space for each loader beyond what it has when it starts


def fault(loader: Loader, folder: Path, path: Path, content: bytes, good: object) -> tuple[str | None, bool]:
    """(what is wrong with how `content` is read, whether it was refused)."""
    path.write_bytes(content)
    try:
        got = loader.load(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or str(folder) not in text or len(text) > 1000:
            return f"not one line that names the file: {text!r:.300}", True
        return None, True
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.200}", True
    return ("read as something else" if loader.summed(content) and got != good else None), False


def campaign(name: str, count: int, seed: int, skip: int = 0, progress: Path | None = None) -> tuple[list[str], int]:
    """(the faults in `count` damaged files of loader `name`, how many were refused). Case i depends on seed and i."""
    loader, found, refused = LOADERS[name], [], 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(folder)
        path = loader.make(folder)
        content, good = path.read_bytes(), loader.load(folder)
        for i in range(skip, count):
            if progress is not None:
                progress.write_text(str(i))
            bad = damaged(content, random.Random(f"{seed} {name} {i}"))
            wrong, was_refused = fault(loader, folder, path, bad, good)
            refused += was_refused
            if wrong:
                found.append(f"{name}, seed {seed}, case {i}: {wrong}")
    return found, refused


def _bounded(name: str, count: int, seed: int, skip: int, progress: Path) -> int:
    import resource

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    found, refused = campaign(name, count, seed, skip, progress)
    print("\n".join(found[:20]))
    print(f"{name}: {count} files, {refused} refused, {len(found)} wrong")
    return bool(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.files", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="files for each loader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loader", choices=tuple(LOADERS), action="append")
    parser.add_argument("--bounded", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.bounded:
        return _bounded(args.loader[0], args.count, args.seed, int(args.bounded[0]), Path(args.bounded[1]))
    began, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        for name in args.loader or LOADERS:
            skip = 0
            while True:
                command = [sys.executable, "-m", "tests.campaigns.files", "--loader", name, "--count", str(args.count)]
                command += ["--seed", str(args.seed), "--bounded", str(skip), str(progress)]
                with contextlib.suppress(FileNotFoundError):
                    progress.unlink()
                done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
                wrong += done.returncode != 0
                if done.returncode >= 0:
                    break
                skip = int(progress.read_text()) + 1
                print(f"{name}, seed {args.seed}, case {skip - 1}: the process died by signal {-done.returncode}")
    print(f"seed {args.seed}: {args.count} files for each loader, {wrong} loaders with faults, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
