"""What a user is told: the two exceptions that the command line turns into exit statuses, and warnings said once."""

from __future__ import annotations

import warnings
from collections.abc import Hashable


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line; the command line prints it and exits with status 2."""


class WorkError(Exception):
    """Work that was asked for rightly and failed (a full disk, say). One line; the command line exits with status 1."""


class FastLoRAWarning(UserWarning):
    """Something was asked for and something else runs; the message names both and says why."""


def shown(name: object) -> str:
    """A name out of a stranger's file, fit to be shown: quoted, control characters escaped, of bounded length."""
    text = ascii(name)
    return text if len(text) <= 200 else text[:200] + "..."


_said: set[Hashable] = set()


def warn_once(key: Hashable, message: str) -> None:
    """Warn with `message` the first time that this process meets `key`, and never again."""
    if key not in _said:
        _said.add(key)
        warnings.warn(message, FastLoRAWarning, stacklevel=3)
