"""Triton's interpreter, faster."""

from __future__ import annotations


def patch_once() -> None:
    """Let helpers be called as they are: the interpreter patches its language anew at each call of one.

    That is up to half of its time. The kernel's launch has patched `tl` already; what a helper of another module needs
    beyond that, its first call patches, and nothing takes it back.
    """
    from triton.runtime.interpreter import InterpretedFunction

    plain, called = InterpretedFunction.__call__, set()

    def call(function, *arguments, **keywords):
        if function.fn not in called:
            called.add(function.fn)
            return plain(function, *arguments, **keywords)
        return function.rewrite()(*arguments, **keywords)

    InterpretedFunction.__call__ = call
