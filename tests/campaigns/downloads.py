"""Random trouble on the way of a download, and processes killed in the midst of one: the right bytes, or one line.

    python -m tests.campaigns.downloads --count 500 --kills 50 --seed 1

The server is on the loopback and does to the first requests of each download, up to five, what `tests.campaigns.server`
can do; some files are replaced at their home for good.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from fastlora.errors import WorkError
from fastlora.finetune import download

from .server import Server, serving

SIZE = 200_000
SHORT = 0.2  # seconds without a byte after which a transfer is given up here
TROUBLE = ("cut", "reset", "stall", "flip", "late range", "no range", "drip", "portal", "noise", 416, 429, 500, 503,
           "redirect", "reason", "endless", "endless trailer")
WEIGHTS = (6, 4, 1, 2, 2, 2, 3, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1)
REDIRECTS = ("/file.bin", "http://[::1", "http://.../x", "http://" + "a" * 70 + ".b/", "http://\xff/", "javascript:1", "ftp://x/",
             "file:///etc/passwd", "data:,x", "http://127.0.0.1:9/", "http://127.0.0.1:99999/", "\x1b[2J")
REASONS = ("\x1b[2J\x1b]0;title\x07", "x" * 60_000)
LINES = ("HTTP/1.1 100 Continue\r\n\r\n", "A: b\r\n", "a", "\0")


def planned(rng: random.Random) -> list:
    """What happens to each request of one download."""
    kinds = rng.choices(TROUBLE, WEIGHTS, k=rng.choice((0, 1, 2, 3, 4, 5)))
    said = {"redirect": REDIRECTS, "reason": REASONS, "endless": LINES}
    numbered = ("cut", "reset", "stall", "flip", "late range")
    return [(kind, rng.choice(said[kind])) if kind in said
            else (kind, rng.randrange(1, SIZE)) if kind in numbered else kind for kind in kinds]  # fmt: skip


def fault(remote: download.Remote, folder: Path) -> tuple[str | None, bool]:
    """(what is wrong with how one download ended, whether it ended with the file)."""
    path = folder / remote.name
    try:
        got = download.download(remote, folder, pause=0.001)
    except WorkError as error:
        if not str(error).isprintable() or len(str(error)) > 1000 or remote.url not in str(error):
            return f"not one line that names the file: {error!s:.300}", False
        return ("a file that is not whole stands under its name" if path.exists() else None), False
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}", False
    if hashlib.sha256(got.read_bytes()).hexdigest() != remote.sha256:
        return "another content was taken for the file", True
    left = [p.name for p in folder.iterdir() if p != got]
    return (f"left {left}" if left else None), True


def campaign(count: int, seed: int) -> tuple[list[str], int]:
    """(the faults in `count` downloads, how many of them ended with the file)."""
    rng, found, fetched = random.Random(seed), [], 0
    download.TIMEOUT, before = SHORT, download.TIMEOUT
    try:
        for number in range(count):
            content = rng.randbytes(SIZE)
            with serving({"/file.bin": content}) as server, tempfile.TemporaryDirectory() as folder:
                remote = _remote(server, content)
                server.plan = plan = planned(rng)
                if rng.random() < 0.1:
                    server.files["/file.bin"] = rng.randbytes(rng.choice((SIZE, SIZE - 1, SIZE + 1, 100)))
                if rng.random() < 0.2:  # what an earlier process left, or another file's beginning
                    left = content if rng.random() < 0.7 else rng.randbytes(SIZE)
                    left = left[: rng.randrange(SIZE)] if rng.random() < 0.7 else left + rng.randbytes(rng.randrange(3))
                    (Path(folder) / "file.bin.part").write_bytes(left)
                said = f"download {number}, seed {seed}, {plan}"
                wrong, done = fault(remote, Path(folder))
                fetched += done
                found += [f"{said}: {wrong}"] if wrong else []
    finally:
        download.TIMEOUT = before
    return found, fetched


def killed(kills: int, seed: int) -> tuple[list[str], int]:
    """(the faults when processes that download are killed and others go on, how many died in mid-transfer)."""
    rng, found, midway = random.Random(seed), [], 0
    content = rng.randbytes(20 * SIZE)
    for number in range(kills):
        with serving({"/file.bin": content}) as server, tempfile.TemporaryDirectory() as folder:
            remote = _remote(server, content)
            server.plan = ["drip"] * 4
            child = os.fork()
            if child == 0:
                try:
                    download.download(remote, Path(folder), pause=0.001)
                finally:
                    os._exit(0)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            midway += (Path(folder) / "file.bin.part").exists()
            wrong, done = fault(remote, Path(folder))
            if wrong or not done:
                found.append(f"kill {number}, seed {seed}: {wrong or 'the next process did not end with the file'}")
    return found, midway


def _remote(server: Server, content: bytes) -> download.Remote:
    url = f"http://127.0.0.1:{server.server_port}/file.bin"
    return download.Remote(url, hashlib.sha256(content).hexdigest(), len(content))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.downloads", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    began = time.monotonic()
    found, fetched = campaign(args.count, args.seed)
    more, midway = killed(args.kills, args.seed)
    found += more
    print("\n".join(found[:20]))
    print(f"seed {args.seed}: {args.count} downloads in trouble, {fetched} ended with the file and the rest in one "
          f"line; {args.kills} processes killed, {midway} in mid-transfer, and gone on with; {len(found)} wrong, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
