"""Ctrl-C while torch is still being imported for the command line: one line and status 130, as `fastlora.cli` later.

The package imports this first, and torch before any line of the command line has run. Only the command line is meant:
`fastlora`, or `python -m fastlora` (whose `argv[0]` is "-m" until the module is found). Other programs keep theirs, and
so does one that goes on after an import of ours that failed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def _leave(number, frame) -> None:
    os.write(2, b"fastlora: interrupted; nothing was begun\n")
    os._exit(130)


def over() -> None:
    """Leave Ctrl-C to Python again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command_line() -> bool:
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":  # as for every module: its name, which may hang on the flags, stands before the arguments
        name = "".join(sys.orig_argv[-len(argv) :][:1])
        return (name.partition("m")[2] if name.startswith("-") else name) == "fastlora"
    return os.path.basename(argv[0]) in ("fastlora", "fastlora.exe")


_unchanged = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _is_command_line() and _unchanged and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _leave)
