"""Files that are whole or not there, and a run's output folder, held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastlora.errors import UserError, WorkError, shown
from fastlora.regular_files import OURS, TEMPORARY, read_regular

try:
    import fcntl
except ImportError:  # Windows: no advisory lock, the rest works
    fcntl = None

SETTINGS = "run.json"  # written first: its presence marks a folder as a run's
REPORT = "report.json"  # written last: its presence marks the run as finished
CHECKPOINT = "checkpoint.safetensors"
RUN_FILES = (SETTINGS, REPORT, CHECKPOINT, "history.csv", "curves.png", "adapter_config.json",
             "adapter_model.safetensors", "model.safetensors", "vocabulary.json", "gpt2")
LOCK = ".fastlora.lock"
MAX_JSON_BYTES = 16 << 20  # the largest, a vocabulary, has half a MiB
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; on success it takes `path`'s place, on failure it is removed.

    The content reaches the disk before the name does, so that a crash leaves the old file or the new one.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f"{OURS}{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would hide results from the user's group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def clear_leftovers(folder: Path) -> None:
    """Remove what `atomic_write` left in `folder` when it was killed."""
    for left in folder.glob(f"{OURS}*{TEMPORARY}"):
        if not left.is_dir():
            left.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # of a path that is not UTF-8, JSON's own escapes


def read_json(path: Path):
    """The JSON in `path`; UserError when it is missing, damaged, no regular file or larger than ours are."""
    try:
        return json.loads(read_regular(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, not JSON") from None


def fingerprint(settings: Mapping) -> str:
    """A digest of a run's settings (JSON values): what they decided is told by it from what others did."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path, wait: bool, busy: str) -> Iterator[None]:
    """Hold the lock file `path` (made if needed, removed after). A holder that dies lets go of it.

    Args:
        path: the lock file.
        wait: wait for another holder; otherwise raise UserError(busy).

    Raises OSError when `path` is a link, a pipe or anything else that is not a file: it may be the user's.
    """
    while True:
        if path.is_symlink():
            raise OSError(errno.EINVAL, "a symbolic link, not a lock file", str(path))
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _SAFELY, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            if fcntl:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    raise UserError(busy) from None
            try:
                ours = os.fstat(handle).st_ino == os.stat(path).st_ino
            except FileNotFoundError:
                ours = False
            if not ours:  # the former holder removed the file that we waited on
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return
        finally:
            os.close(handle)


@contextlib.contextmanager
def run_folder(path: Path, settings: Mapping, resume: bool) -> Iterator[bool]:
    """Hold `path` as the output folder of a run; yields True when it holds an unfinished run to go on with.

    Args:
        path: the folder, made if needed.
        settings: what decides the run's result (JSON values); kept in run.json, so that a run is resumed only with
            the settings it was started with.
        resume: go on with the run that the folder holds (an empty folder starts a new one).

    Raises:
        UserError: the folder holds a run and `resume` is false, the run was started with other settings, another
            process holds the folder, or it cannot be written to.
        WorkError: the disk is full.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # safetensors could write there and not read
        raise UserError(f"{path}: cannot be used as output folder (its name is not UTF-8)") from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = contextlib.ExitStack()
        held.enter_context(locked(path / LOCK, wait=False, busy=f"{path}: another run is writing to this folder"))
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"{path}: cannot be used as output folder ({error.strerror})") from None
    with held:
        begun = _begun(path, settings, resume)
        if resume and not begun:
            print(f"{path}: holds no run to go on with; a new one starts", flush=True)
        clear_leftovers(path)
        if not begun:
            write_json(path / SETTINGS, dict(settings))
        try:
            yield begun
        except Exception:
            if not any(os.path.lexists(path / name) for name in RUN_FILES if name != SETTINGS):
                (path / SETTINGS).unlink(missing_ok=True)  # nothing was made: the folder is free for another try
            raise


def _begun(path: Path, settings: Mapping, resume: bool) -> bool:
    present = [name for name in RUN_FILES if os.path.lexists(path / name)]
    if not present:
        return False
    if not resume:
        state = "a finished run" if {SETTINGS, REPORT} <= {*present} else f"a run's files ({present[0]})"
        hint = ", or go on with it by --resume" if SETTINGS in present and REPORT not in present else ""
        raise UserError(f"{path}: holds {state} already; choose another --output{hint}")
    if SETTINGS not in present:
        raise UserError(f"{path}: holds {present[0]} but no {SETTINGS}, so there is no run to resume")
    before = read_json(path / SETTINGS)
    if not isinstance(before, dict):
        raise UserError(f"{path / SETTINGS}: damaged, not a run's settings")
    now = json.loads(json.dumps(dict(settings)))
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            name = key if key in now else shown(key)
            raise UserError(f"{path}: the run was started with {name} = {shown(before.get(key))}, not "
                            f"{shown(now.get(key))}; --resume needs the same settings")
    return True


def explain_os_error(error: OSError) -> WorkError:
    """One line for an error of the operating system that ended the work."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in FULL:
        return WorkError(f"{place}the disk is full; what was written whole before is kept "
                         "(make room, then run again with --resume)")
    return WorkError(f"{place}{error.strerror or error}")
