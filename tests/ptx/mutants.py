"""Does the emulator notice? Break a kernel's PTX in one place at a time: python -m tests.ptx.mutants [--most N] [-v]

Each mutant lacks one barrier, wait, fence or guard, waits for one group or phase less, copies another number of bytes,
reads a matrix the other way round, forgets a swizzle, or computes one address bit wrong. It is killed by a fault (race,
bounds, deadlock) or by a wrong number. What survives is listed: an instruction that was not needed, or a hole.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastlora.kernels.tiles import Target

from . import gpu
from .cases import Case, quick, run
from .gpu import Emulator


def gone(m: re.Match) -> str:
    return ""


SWIZZLE = "swizzle's xor of another bit"
# name, pattern, what it becomes
MUTATIONS = [
    ("no bar.sync", r"^\s*bar\.sync\s[^;]*;", gone),
    ("no cp.async.wait_group", r"^\s*cp\.async\.wait_group[^;]*;", gone),
    ("one copy group less waited for", r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    ("no cp.async.commit_group", r"^\s*cp\.async\.commit_group;", gone),
    ("no fence.proxy.async", r"^\s*fence\.proxy\.async[^;]*;", gone),
    ("no wgmma.wait_group", r"^\s*wgmma\.wait_group[^;]*;", gone),
    ("one wgmma group less waited for", r"(wgmma\.wait_group\S+\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    ("no bulk wait", r"^\s*cp\.async\.bulk\.wait_group[^;]*;", gone),
    ("no mbarrier.init", r"^[^;\n]*mbarrier\.init[^;]*;", gone),
    ("no expect_tx", r"^[^;\n]*mbarrier\.arrive\.expect_tx[^;]*;", gone),
    ("other byte count", r"(expect_tx\.\S+ _, \[[^]]*\], )(\d+)", lambda m: f"{m[1]}{int(m[2]) - 16}"),
    ("no mbarrier wait", r"@!complete bra\.uni waitLoop;", gone),
    ("a phase early", r"(mbarrier\.try_wait\.parity[^]]*\], )(%r\d+);",
     lambda m: f".reg .b32 early; xor.b32 early, {m[2]}, 1; {m[1]}early;"),
    ("unguarded global access", r"@!?%p\d+(\s+(ld|st)\.global)", lambda m: m[1]),
    ("unguarded copy", r"(, 0x(\w+), )%r\d+(?=;)", lambda m: f"{m[1]}{int(m[2], 16)}"),
    ("mask one too wide", r"setp\.lt\.s32", lambda m: "setp.le.s32"),
    ("mask one too wide", r"setp\.gt\.s32", lambda m: "setp.ge.s32"),
    ("mask one too wide", r"setp\.lt\.s64", lambda m: "setp.le.s64"),
    ("mask one too wide", r"setp\.gt\.s64", lambda m: "setp.ge.s64"),
    ("ldmatrix the other way", r"(ldmatrix\S+m8n8\.x4)(\.trans)?", lambda m: m[1] if m[2] else m[1] + ".trans"),
    (SWIZZLE, r"(xor\.b32\s+%r\d+, %r\d+, )(\d+)", lambda m: f"{m[1]}{int(m[2]) ^ 16}"),
    ("matrix operands exchanged", r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)", lambda m: f"{m[1]}{m[3]}, {m[2]}"),
]  # fmt: skip


def mutants(text: str) -> Iterator[tuple[str, int, str]]:
    """(mutation, line, mutant), one place at a time."""
    for name, pattern, becomes in MUTATIONS:
        for m in re.finditer(pattern, text, flags=re.M):
            yield name, text.count("\n", 0, m.end()) + 1, text[: m.start()] + becomes(m) + text[m.end() :]


def everywhere(text: str, parameters: list[str]) -> Iterator[tuple[str, str]]:
    """(mutation, mutant), at all places at once; and the kernel's idea of M, N or K one too large.

    But one place where all together would only be another swizzle, the same for who writes and who reads.
    """
    for name in dict.fromkeys(name for name, _, _ in MUTATIONS):
        mutant = text
        for _, pattern, becomes in (mutation for mutation in MUTATIONS if mutation[0] == name):
            mutant = re.sub(pattern, becomes, mutant, flags=re.M, count=int(name == SWIZZLE))
        if mutant != text and name != "mask one too wide":
            yield name, mutant
    for name in ("M", "N", "K"):
        if name in parameters:
            load = rf"(ld\.param\.[bus]32\s+(%r\d+), \[\w+_param_{parameters.index(name)}\];)"
            mutant, count = re.subn(load, r"\1 add.s32 \2, \2, 1;", text)
            if count:
                yield f"{name} one too large", mutant


def original(case: Case) -> tuple[str, list[str]]:
    """The PTX of the case's first launch, and the names of its parameters."""
    texts: list[str] = []
    with Emulator(case.target.arch, lambda text: texts.append(text) or text) as emulator:
        run(case)
    signature = next(iter(emulator.cache.values())).signature
    return texts[0], [name for name, kind in signature.items() if kind != "constexpr"]


def dies(case: Case, text: str, mutant: str) -> str | None:
    """What the emulator says of the case with `mutant` in the place of `text`; None: nothing."""
    for order in ({"late": True}, {"seed": 0}, {"seed": 1}):
        try:
            with Emulator(case.target.arch, lambda t: mutant if t == text else t, steps=50_000, **order):
                run(case)
        except Exception as error:  # whatever it is, it was noticed
            return f"{type(error).__name__}: {error}"
    return None


def without_swizzle(case: Case) -> str | None:
    """As `dies`, with tensor maps that leave rows as they are."""
    right, gpu.tensor_map = gpu.tensor_map, lambda value, meta: replace(right(value, meta), swizzle=0)
    try:
        return dies(case, "", "")
    finally:
        gpu.tensor_map = right


def report(case: Case, most: int, verbose: bool) -> int:
    """Runs the case's mutants, `most` of each mutation; how many survive."""
    (text, _), chance = original(case), random.Random(0)
    found = defaultdict(list)
    for name, line, mutant in mutants(text):
        found[name].append((line, mutant))
    died, alive = defaultdict(Counter), defaultdict(list)
    for name, places in found.items():
        for line, mutant in sorted(chance.sample(places, min(most, len(places)))):
            what = dies(case, text, mutant)
            if what is None:
                alive[name].append(line)
            else:
                died[name][
                    next((w for w in ("race", "deadlock", "out of bounds", "nobody") if w in what), what.split(":")[0])
                ] += 1
            if verbose:
                print(f"   {name} at {line}: {what or 'survives'}"[:220], flush=True)
    for name in found:
        count = sum(died[name].values())
        how = ", ".join(f"{n} by {k}" for k, n in died[name].items())
        lines = f"; survive: lines {alive[name]}" if alive[name] else ""
        print(f"   {name}: {count} of {count + len(alive[name])} killed ({how}){lines}", flush=True)
    if case.tile.tma:
        print(f"   tensor map without its swizzle: {without_swizzle(case)}"[:160])
    return sum(map(len, alive.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, nargs="*", help="only these cases")
    parser.add_argument("--most", type=int, default=4, help="places of each mutation (default: 4)")
    parser.add_argument("-v", action="store_true", help="say how each mutant died")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    survive = 0
    for number, case in enumerate(c for arch in (80, 90) for c in quick(Target("cuda", arch))):
        if args.case is None or number in args.case:
            print(f"{number}: {case}", flush=True)
            survive += report(case, args.most, args.v)
    print(f"{survive} survive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
