"""The error rule for tests: the package's own, which the device self-check uses too."""

from __future__ import annotations

from fastlora.accuracy import Inputs, draw, run, violations

__all__ = ["Inputs", "check", "draw", "run", "violations"]


def check(function, inputs: Inputs, **keywords) -> dict:
    """Run `function` forward and backward, fail on any violation of the rule, and return its outputs."""
    got = run(function, inputs, **keywords)
    found = violations(got, inputs)
    assert not found, "; ".join(found)
    return got
