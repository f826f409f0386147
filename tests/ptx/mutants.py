"""Does the emulator notice? Break a kernel's PTX in one place at a time: python -m checks.mutants [--case N] [-v]

Each mutant lacks one barrier, wait, fence or guard, waits for one group less, copies one byte less, reads a matrix the
other way round, or computes one address bit wrong. It is killed by a fault (race, bounds, deadlock) or by a wrong
number. What survives is listed: an instruction that was not needed, or a hole in the emulator.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter, defaultdict

import torch

from .cases import Case, gemm_cases, run, small_cases
from .gpu import Emulator


def gone(m: re.Match) -> str:
    return ""


# name, pattern, what it becomes
MUTATIONS = [
    ("no bar.sync", r"^\s*bar\.sync\s[^;]*;", gone),
    ("no cp.async.wait_group", r"^\s*cp\.async\.wait_group[^;]*;", gone),
    ("one copy group less waited for", r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    ("no commit_group", r"^\s*cp\.async\.commit_group;", gone),
    ("no fence.proxy.async", r"^\s*fence\.proxy\.async[^;]*;", gone),
    ("no wgmma.wait_group", r"^\s*wgmma\.wait_group[^;]*;", gone),
    ("one wgmma group less waited for", r"(wgmma\.wait_group\S+\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    ("no bulk wait", r"^\s*cp\.async\.bulk\.wait_group[^;]*;", gone),
    ("no mbarrier.init", r"^[^;\n]*mbarrier\.init[^;]*;", gone),
    ("no expect_tx", r"^[^;\n]*mbarrier\.arrive\.expect_tx[^;]*;", gone),
    ("other byte count", r"(expect_tx\.shared::cta\.b64 _, \[[^]]*\], )(\d+)", lambda m: f"{m[1]}{int(m[2]) - 16}"),
    ("no mbarrier wait", r"@!complete bra\.uni waitLoop;", gone),
    ("unguarded global access", r"@!?%p\d+(\s+(ld|st)\.global)", lambda m: m[1]),
    ("unguarded copy", r"(, 0x(\w+), )%r\d+(?=;)", lambda m: f"{m[1]}{int(m[2], 16)}"),
    ("mask one too wide", r"setp\.lt\.s32", lambda m: "setp.le.s32"),
    ("ldmatrix transposed", r"(ldmatrix\S+m8n8\.x4)(\.trans)?", lambda m: m[1] if m[2] else m[1] + ".trans"),
    ("xor bit", r"(xor\.b32\s+%r\d+, %r\d+, )(\d+)", lambda m: f"{m[1]}{int(m[2]) ^ 16}"),
    ("mma operands exchanged", r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)", lambda m: f"{m[1]}{m[3]}, {m[2]}"),
]  # fmt: skip


def mutants(text: str):
    """(mutation, line, mutant)"""
    for name, pattern, becomes in MUTATIONS:
        for m in re.finditer(pattern, text, flags=re.M):
            line = text.count("\n", 0, m.end()) + 1
            yield name, line, text[: m.start()] + becomes(m) + text[m.end() :]


def cases() -> list[Case]:
    """Each kernel on sm_80 and sm_90: through cp.async or TMA, and with odd strides."""
    chosen = []
    for arch in (80, 90):
        found = [*gemm_cases(arch), *small_cases(arch)]
        found = [c for c in found if c.dtype == c.adapter == torch.bfloat16]
        for kernel, p in (
            ("S", 0.3),
            ("gemm forward", 0.0),
            ("gemm dx", 0.3),
            ("dS dB", 0.0),
            ("dA", 0.3),
            ("onepass", 0.3),
        ):
            match = [c for c in found if c.kernel == kernel and c.p == p]
            chosen += [match[0], match[-1]]
            chosen += [c for c in match if c.tile and c.tile.tma and c.tile.block_n == 256][:1]
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, nargs="*", help="only these cases")
    parser.add_argument("-v", action="store_true", help="say how each mutant died")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number, case in enumerate(cases()):
        if args.case is None or number in args.case:
            print(f"{number}: {case}")
            report(case, args.v)
    return 0


def report(case: Case, verbose: bool) -> None:
    """Runs all mutants of one case's kernel, one after another."""
    texts: list[str] = []
    with Emulator(case.arch, edit=lambda text: texts.append(text) or text):
        run(case)
    original = texts[0]
    died, alive = defaultdict(Counter), defaultdict(list)
    for name, line, changed in mutants(original):
        try:
            with Emulator(case.arch, edit=lambda text, changed=changed: changed if text == original else text):
                run(case)
        except Exception as error:  # whatever it is, it was noticed
            what = str(error)
            words = ("race", "deadlock", "out of bounds", "nobody wrote")
            died[name][next((w for w in words if w in what), type(error).__name__)] += 1
            if verbose:
                print(f"   {name} at {line}: {what[:160]}")
        else:
            alive[name].append(line)
    for name, _, _ in MUTATIONS:
        count = sum(died[name].values())
        if count or alive[name]:
            how = ", ".join(f"{n} by {k}" for k, n in died[name].items())
            lines = f"; survive: lines {alive[name]}" if alive[name] else ""
            print(f"   {name}: {count} of {count + len(alive[name])} killed ({how}){lines}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
