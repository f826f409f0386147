"""The paths, and which of them runs: chosen from measurements, never guessed, and never silently changed.

A path is a module with `NAME`, `unavailable(device)`, `unsupported(problem)`, `draw`, `mask`, `forward`, `backward` and
`s_factor`: one way to compute the same function. `torch` is always there; what no table or tuning run has measured to
be faster on a device does not run unless it is asked for by name.
"""

from __future__ import annotations

from fastlora.dispatch.check import selfcheck
from fastlora.dispatch.choice import Choice, Explanation, choose, explain, paths, select
from fastlora.dispatch.problem import Problem

__all__ = ["Choice", "Explanation", "Problem", "choose", "explain", "paths", "select", "selfcheck"]
