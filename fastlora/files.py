"""The one place for files: regular ones are read, up to a bound; what is written is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastlora.errors import UserError

OURS, TEMPORARY = ".fastlora-", ".part"  # how temporary files begin and end; the user's own are never touched
MAX_JSON = 16 << 20  # bytes; ours have some KiB
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The file, open for reading; OSError for a folder, a pipe (which would be waited for) or a device."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """All of a regular file of at most `most` bytes; OSError for any other."""
    with open_regular(path) as file:
        content = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else b""
        size = max(len(content), os.fstat(file.fileno()).st_size)
    if size > most:
        raise OSError(errno.EINVAL, f"{size} bytes are more than the {most} that such a file has at most", str(path))
    return content


def sha256(path: str | os.PathLike) -> str:
    """The digest of a regular file of any size; OSError for any other."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; on success it takes `path`'s place, on failure it is removed.

    The content reaches the disk before the name does, so that a crash leaves the old file or the new one.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f"{OURS}{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's 0600 would hide results from the user's group
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    with contextlib.suppress(OSError):  # folders cannot be synchronised everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # of a path that is not UTF-8, JSON's own escapes


def read_json(path: str | os.PathLike):
    """The JSON in `path`; UserError when it is missing, damaged, no regular file or larger than ours are."""
    try:
        return json.loads(read_regular(path, MAX_JSON))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, not JSON") from None


def clear_leftovers(folder: Path) -> None:
    """Remove what `atomic_write` left in `folder` when it was killed."""
    for left in folder.glob(f"{OURS}*{TEMPORARY}"):
        if not left.is_dir():
            left.unlink()
