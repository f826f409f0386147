"""Broken copies of the kernels, one place of the PTX each. One that nobody notices is a check that is missing.

A mutant is (kernel, kind, n): the n-th place of its kind, among those that the kernel has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# kind -> what is found, and what it becomes
KINDS: dict[str, tuple[str, str]] = {
    "no proxy fence": (r"fence\.proxy\.async;", ""),
    "flag read without acquire": (r"ld\.acquire\.gpu", "ld.relaxed.gpu"),
    "flag not waited for": (r"ld\.acquire\.gpu\.global\.s32 (%r\d+), \[%rd\d+\];", r"mov.u32 \1, 1000;"),
    "flag set without release": (r"st\.release\.gpu", "st.relaxed.gpu"),
    "flag not set": (r"st\.release\.gpu[^;]*;", ""),
    "counter without order": (r"atom\.acq_rel\.gpu", "atom.relaxed.gpu"),
    "wrong phase": (
        r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+\], )([^;]+);",
        r".reg .b32 q; xor.b32 q, \2, 1; \1q;",
    ),
    "stage not given back": (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", ""),
    "stage given back twice": (r"(mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)", r"\1\n\1"),
    "bytes announced without all": (
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, (\[%r\d+\]), ([^;]+);",
        r".reg .b32 q; add.s32 q, \2, -16; mbarrier.arrive.expect_tx.shared::cta.b64 _, \1, q;",
    ),
    "no wait for products": (r"wgmma\.wait_group\.sync\.aligned \d;", ""),
    "no barrier": (r"\bbar\.sync\s+[^;]+;", ""),
    "no wait before a piece is used again": (r"cp\.async\.bulk\.wait_group\.read \d;", ""),
}


@dataclass(frozen=True)
class Mutant:
    """Changes a kernel's PTX; callable, and a key of caches."""

    kernel: str  # "forward" or "backward"
    kind: str
    number: int

    def __call__(self, text: str) -> str:
        pattern, becomes = KINDS[self.kind]
        found = list(re.finditer(pattern, text))
        if self.number >= len(found):
            raise ValueError(f"{self.kind}: the kernel has {len(found)} such places")
        at = found[self.number]
        new = "{" + at.expand(becomes) + "}" if ".reg" in becomes else at.expand(becomes)
        return text[: at.start()] + new + text[at.end() :]


def all_of(kernel: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a kernel's PTX."""
    for kind, (pattern, _) in KINDS.items():
        for number in range(len(re.findall(pattern, text))):
            yield Mutant(kernel, kind, number)


def notice(mutant: Mutant) -> str | None:
    """What is said of a broken copy, by the emulator or by the numbers; None: nothing, under any of the schedules."""
    from fastlora import accuracy
    from tests.cuda.cases import Case, call
    from tests.cuda.gpu import Emulated
    from tests.ptx.launch import Options

    sizes = (264, 520, 264) if mutant.kernel == "forward" else (264, 136, 520)
    cases = (
        Case(*sizes, 8, p=0.25, sms=5),  # two CTAs that stream, three that multiply, each several tiles
        Case(*sizes, 8, sms=5),  # without dropout another tail runs
    )
    for case in cases:
        for options in (Options(), Options(late=False), *(Options(seed=seed) for seed in range(4))):
            try:
                found = accuracy.violations(*call(case, Emulated(case.sms, options, mutant), mutant.kernel))
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:160]}"
            if found:
                return f"numbers: {found[0]}"
    return None
