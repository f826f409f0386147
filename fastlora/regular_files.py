"""Reading what strangers may have put in a file's place: regular files only, into memory never more than a bound.

What is wrong is an `OSError` whose `strerror` says it, as for a file that cannot be opened at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import BinaryIO

OURS, TEMPORARY = ".fastlora-", ".part"  # how temporary files begin and end; the user's own are never touched


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
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(size + 1)
    if max(size, len(content)) > most:
        raise OSError(errno.EINVAL, f"{size} bytes are more than the {most} that such a file has at most", str(path))
    return content


def sha256(path: str | os.PathLike) -> str:
    """The digest of a regular file of any size; OSError for any other."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_regular(path: str | os.PathLike) -> None:
    """OSError unless `path` is a regular file that can be read: for libraries that open it by its name."""
    open_regular(path).close()
