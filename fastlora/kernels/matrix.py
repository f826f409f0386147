"""Compile every launch that the package can make, with every tile, for every target: with no GPU.

    python -m fastlora.kernels.matrix [--quick] [--target cuda:90] [--kernel gemm] [--json FILE]

Triton's offline compiler and `cuobjdump -res-usage` tell, before any GPU is seen, what a launch would find there:
registers and stack of each thread, shared memory, programs on a multiprocessor. The claims, any of which makes the exit
status 1 when it fails:

- it compiles;
- it keeps everything in registers (CUDA: no stack; HIP: no spilled vector registers);
- its shared memory, and on sm_100 its tensor memory, is within the architecture's limit;
- through descriptors, sm_90 multiplies by `wgmma`;
- no register is written that a pending `wgmma` reads (triton's issue 9433).

float16 is compiled where bfloat16 has no instructions; elsewhere the two are one code but for the type's name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from fastlora import env
from fastlora.kernels import gemm, gemm_each, grads, grouped, onepass, s, shared, tiles, up
from fastlora.kernels.dropout import Dropout, drop_launch, mask_bits, mask_launch
from fastlora.kernels.launch import Launch
from fastlora.kernels.tiles import TARGETS, Target
from fastlora.paths.bank import Bank
from fastlora.paths.problem import Problem, drawn_bank

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TENSOR_MEMORY_LIMIT = 512  # columns of sm_100; the compiler says what it needs and leaves the refusal to the launch
QUICK_TARGETS = (Target("cuda", 80), Target("cuda", 90))
M = 1 << 16  # rows enough that nothing is split, and few enough that everything is
FEW = 256
SEED = torch.empty(1, dtype=torch.int64, device="meta")


@dataclass(frozen=True)
class Report:
    """What the compiler said of one launch; `failures` lists the claims that do not hold."""

    target: str
    label: str
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    programs: int | None = None
    wgmma: int = 0
    failures: tuple[str, ...] = ()

    @property
    def kernel(self) -> str:
        return self.label.split("/")[0]


def _tensor(rows: int, columns: int, dtype: torch.dtype, aligned: bool = True) -> Tensor:
    start = 0 if aligned else 1
    return torch.empty(rows * columns + start, dtype=dtype, device="meta")[start:].view(rows, columns)


@cache
def _bank(rows: int, R: int) -> Bank:
    """Two adapters and rows of none."""
    half = torch.float16
    return drawn_bank(Problem(rows, 1, 1, R, half, half, SEED.device, True, bank=True))


def _rank_launches(target: Target, dtype: torch.dtype, adapter: torch.dtype, aligned: bool) -> Iterator[Launch]:
    """Every tile of the rank-R kernels, with dropout and without, whole and split, of one adapter and of a bank."""
    n = 4096 if aligned else 4097
    kind = tiles.kind_of(dtype, tiles.input_precision(dtype, target))
    bias = _tensor(1, n, dtype, aligned)[0]
    for R, several, drops, m in itertools.product((16, 32, 128, 256), (False, True), (True, False), (M, FEW)):
        if (m == FEW or adapter != dtype) and (not drops or R != 32):
            continue  # partials differ by their dtype, float32 adapters by their load
        if (several and (adapter != dtype or not (drops or R in (32, 256)))) or (R == 256 and not several):
            continue
        scaling = _bank(m, R) if several else 2.0
        dropout = Dropout(scaling if several else 0.1, SEED) if drops else None
        x, y, W = _tensor(m, n, dtype, aligned), _tensor(m, n, dtype, aligned), _tensor(n, n, dtype, aligned)
        S, A, B = _tensor(m, R, dtype), _tensor(R, n, adapter, aligned), _tensor(n, R, adapter, aligned)
        if R != 16:  # the tables' cuts are for 32 and 128, but for ds_db
            for tile in tiles.rank_tiles("s", target, R, kind, several):
                yield from s.s_launches(target, x, A, scaling, dropout, S, tile)
            if not several or R == 256:
                for tile in tiles.rank_tiles("up", target, R, kind):
                    for bits in [None] if dropout is None else [None, mask_bits(m, n, x.device)]:
                        yield up.up_launch(target, S, B.t(), bias, bits, y, tile)
            for tile in tiles.rank_tiles("da", target, R, kind, several and drops):
                for bits in [None] if dropout is None else [None, mask_bits(m, n, x.device)]:
                    yield from grads.da_launches(target, S, x, dropout, A, tile, bits)
            for tile in tiles.rank_tiles("onepass", target, R, kind, several):
                yield onepass.onepass_launch(target, x, W, bias, A, B, scaling, dropout, y, S, tile)
        if dropout is None or several or m == FEW or adapter != dtype:
            for tile in tiles.rank_tiles("ds_db", target, R, kind):
                narrow, dS = _tensor(m, 16 if aligned else 17, dtype, aligned), torch.empty_like(S)
                yield from grads.ds_db_launches(target, y, B, S, scaling, dS, torch.empty_like(B), tile)
                if m == M:  # one region wide
                    few = _tensor(narrow.shape[1], R, adapter, aligned)
                    yield from grads.ds_db_launches(target, narrow, few, S, scaling, dS, torch.empty_like(few), tile)
    for p in (0.1, _bank(n, 32)):
        for out in (torch.empty(n, n, dtype=torch.int8, device="meta"), mask_bits(n, n, SEED.device)):
            yield mask_launch(Dropout(p, SEED), out)
        x = _tensor(n, n, dtype, aligned)
        yield drop_launch(target, Dropout(p, SEED), x, x, x)


def _shared_launches(target: Target, dtype: torch.dtype, adapter: torch.dtype, aligned: bool) -> Iterator[Launch]:
    """As many adapters of a rank as share a launch, with dropout and without, dX written and added to."""
    n = 4096 if aligned else 4097
    for (count, R), dropout in itertools.product(((3, 16), (2, 32), (1, 64)), (Dropout(0.1, SEED), None)):
        x, y, dropouts = _tensor(M, n, dtype, aligned), _tensor(M, n, dtype, aligned), [dropout] * 2 * count
        As = [_tensor(R, n, adapter) for _ in dropouts]
        S = [_tensor(M, R, dtype) for _ in dropouts]
        yield from shared.s_shared_launches(target, x, As, [2.0] * 2 * count, dropouts, S)
        yield from shared.da_dx_shared_launches(target, S, x, As, dropouts, As, y)  # the second launch adds
        yield from shared.da_dx_shared_launches(target, S, x, As, dropouts, As, None)


def _grouped_launches(target: Target, dtype: torch.dtype, adapter: torch.dtype, aligned: bool) -> Iterator[Launch]:
    """Three projections in a launch, as wide a rank as each kernel takes; every tile of their products."""
    kind = tiles.kind_of(dtype, tiles.input_precision(dtype, target))
    sizes = (4096, 4112) if aligned else (4097,)  # whole steps of the K loop, and a last one that is not
    for m, R, n in itertools.product((M, FEW), (16, 32, 64), sizes):
        if m == FEW and (R != 32 or n == 4112):
            continue
        x, W, bias = _tensor(m, n, dtype, aligned), _tensor(n, n, dtype, aligned), _tensor(1, n, dtype, aligned)[0]
        Ss, Bs, ys, Ws = [_tensor(m, R, dtype)] * 3, [_tensor(n, R, adapter)] * 3, [torch.empty_like(x)] * 3, [W] * 3
        yield grouped.up_each_launch(target, Ss, Bs, [bias] * 3, ys)
        yield from (grouped.ds_db_each_launches(target, ys, Bs, Ss, [2.0] * 3) or ((),))[0]
        for tile in gemm_each.gemm_each_tiles(target, kind, R, aligned):
            yield gemm_each.gemm_each_launch(target, x, Ws, [bias] * 3, Ss, Bs, ys, tile)
        for tile in gemm_each.gemm_sum_tiles(target, kind, aligned, False) if R == 16 and m == M else ():
            yield gemm_each.gemm_sum_launch(target, ys, Ws, x, tile)
    for tile in gemm_each.gemm_sum_tiles(target, kind, aligned, True) if target.has_tma else ():
        n = 4096 if aligned else 4104
        x, W = _tensor(M, n, dtype), _tensor(n, n, dtype)
        for weight in (W, W.t()):
            yield gemm_each.gemm_sum_launch(target, [x] * 3, [weight] * 3, torch.empty_like(x), tile)


def _gemm_launches(target: Target, dtype: torch.dtype, adapter: torch.dtype, aligned: bool) -> Iterator[Launch]:
    """Every tile of the GEMM: forward, dX with a mask and with none."""
    kind = tiles.kind_of(dtype, tiles.input_precision(dtype, target))
    for R, tma in itertools.product((32, 128, 256), (True, False) if target.has_tma else (False,)):
        if adapter != dtype and R != 32:
            continue
        # whole tiles, and a K that ends within one; whole 16-byte rows and no more; nothing of the sort
        for n in (4096, *[4112] * (R == 32 and not tma)) if aligned else (4104,) if tma else (4097,):
            whole = aligned or tma
            x, y, W = _tensor(2 * n, n, dtype, whole), _tensor(2 * n, n, dtype, whole), _tensor(n, n, dtype, whole)
            S, A, B = _tensor(2 * n, R, dtype), _tensor(R, n, adapter, whole), _tensor(n, R, adapter, whole)
            bias, bits = _tensor(1, n, dtype, whole)[0], mask_bits(2 * n, n, x.device)
            for tile in tiles.gemm_row(target, kind, R, aligned, False, tma):
                yield gemm.gemm_launch(target, x, W.t(), bias, S, B.t(), None, y, tile)
                yield gemm.gemm_launch(target, x, W, None, S, A, None, y, tile)
            for tile in tiles.gemm_row(target, kind, R, aligned, True, tma):
                yield gemm.gemm_launch(target, x, W, None, S, A, bits, y, tile)


def _specialised_launches(target: Target, dtype: torch.dtype, adapter: torch.dtype, aligned: bool) -> Iterator[Launch]:
    """The warp-specialised GEMM: every rank block, forward, dX with the mask from bits and with none."""
    n = 4096 if aligned else 4104
    x, W, bias = _tensor(2 * n, n, dtype), _tensor(n, n, dtype), _tensor(1, n, dtype)[0]
    for R in (16, 32, 64, 128, 256):
        S, A, B = _tensor(2 * n, R, dtype), _tensor(R, n, adapter), _tensor(n, R, adapter)
        for tile in gemm.specialised(target, x, W, A):
            y, bits = torch.empty_like(x), mask_bits(2 * n, n, x.device)
            yield gemm.gemm_launch(target, x, W.t(), bias, S, B.t(), None, y, tile)
            yield gemm.gemm_launch(target, x, W, None, S, A, None, y, tile)
            yield gemm.gemm_launch(target, x, W, None, S, A, bits, y, tile)


def launches(targets: Iterable[Target] = TARGETS, quick: bool = False) -> Iterator[tuple[Target, Launch]]:
    """Every launch to compile, each once for a target; `quick` keeps the first of each kernel, dtype and alignment."""
    before = torch.get_float32_matmul_precision()
    for target in targets:
        seen: set[str] = set()
        half = torch.bfloat16 if target.has_bfloat16 else torch.float16
        tf32 = target.backend == "cuda" and int(target.arch) >= 80
        types = [(half, half, False), (half, torch.float32, False), (torch.float32, torch.float32, False)]
        types += [(torch.float32, torch.float32, True)] * tf32
        for (dtype, adapter, fast), aligned in itertools.product(types, (True, False)):
            if adapter != dtype and not aligned:
                continue  # what differs is the adapter's load alone
            try:
                torch.set_float32_matmul_precision("high" if fast else "highest")
                made = [*_rank_launches(target, dtype, adapter, aligned)]
                made += _shared_launches(target, dtype, adapter, aligned)
                made += _grouped_launches(target, dtype, adapter, aligned)
                made += _gemm_launches(target, dtype, adapter, aligned)
                made += _specialised_launches(target, dtype, adapter, aligned)
            finally:
                torch.set_float32_matmul_precision(before)
            for launch in made:
                key = f"{launch.fn.__name__} {dtype} {aligned}" if quick else launch.label
                if key not in seen and not (quick and (fast or adapter != dtype)):
                    seen.add(key)
                    yield target, launch


def _usage(kernel, target: Target) -> tuple[int | None, int | None]:
    """Registers of a thread and what it spilled: bytes of stack on CUDA, vector registers on HIP."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spilled = (re.search(rf"\.vgpr_{name}:\s*(\d+)", text) for name in ("count", "spill_count"))
        return (int(registers[1]) if registers else None), (int(spilled[1]) if spilled else None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = os.environ.get("TRITON_CUOBJDUMP_PATH", str(CUOBJDUMP))
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    return int(found[1]), int(found[2]) + int(found[3])


def overwritten(ptx: str) -> str | None:
    """A register that is written while a `wgmma` which reads it may be pending, or None.

    Straight through the text, and twice through every loop, as a backward branch gives it.
    """
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = [(labels[to], i) for i, line in enumerate(lines) for to in re.findall(r"bra(?:\.uni)?\s+(\S+);", line)
             if labels.get(to, i) < i]  # fmt: skip
    for start, end in [(0, len(lines)), *loops]:
        open_: set[str] = set()  # read by what is not yet committed
        pending: list[set[str]] = []  # by each committed group
        for line in lines[start:end] * (1 if (start, end) == (0, len(lines)) else 2):
            if line.startswith("wgmma.mma_async"):
                read = re.match(r"\S+\s*\{[^}]*\},\s*\{([^}]*)\}", line)  # the first operand is a matrix in registers
                open_ |= set(re.findall(r"%\w+", read[1])) if read else set()
            elif line.startswith("wgmma.commit_group"):
                pending, open_ = [*pending, open_], set()
            elif line.startswith("wgmma.wait_group"):
                left = int(re.search(r"(\d+);", line)[1])
                pending = pending[len(pending) - left :] if left else []
            elif written := re.match(r"(?:@!?%\w+\s+)?(?!st|wgmma|bar|red|cp)[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)", line):
                hit = set(re.findall(r"%\w+", written[1])) & open_.union(*pending)
                if hit:
                    return min(hit)
    return None


def examine(item: tuple[Target, Launch]) -> Report:
    """Compile one launch and hold it against the claims."""
    if env.interpreting():
        raise RuntimeError("TRITON_INTERPRET replaces the compiler that the matrix is about: unset it")
    target, launch = item
    try:
        binary = launch.compile(target)
        registers, spilled = _usage(binary, target)
    except Exception as error:  # the compiler raises whatever its passes raise; the matrix reports and goes on
        told = f"does not compile: {type(error).__name__}: {error}".splitlines()[0][:200]
        return Report(str(target), launch.label, failures=(told,))
    shared, failures = binary.metadata.shared, []
    ptx = binary.asm["ptx"] if target.backend == "cuda" else ""
    wgmma = ptx.count("wgmma.mma_async")
    if spilled:
        failures.append(f"spills {spilled} {'bytes' if target.backend == 'cuda' else 'registers'}")
    if shared > target.shared_limit:
        failures.append(f"takes {shared} bytes of shared memory, {target.shared_limit} there are")
    if getattr(binary.metadata, "tmem_size", 0) > TENSOR_MEMORY_LIMIT:
        failures.append(f"takes {binary.metadata.tmem_size} of {TENSOR_MEMORY_LIMIT} columns of tensor memory")
    if target.arch == 90 and "x_desc" in launch.args and not wgmma:
        failures.append("has no wgmma")
    if wgmma and (register := overwritten(ptx)):
        failures.append(f"writes {register} while a wgmma that reads it is pending")
    programs = target.programs(registers, shared, binary.metadata.num_warps) if registers else None
    return Report(str(target), launch.label, registers, spilled, shared, programs, wgmma, tuple(failures))


def run(items: list[tuple[Target, Launch]], workers: int | None = None) -> Iterator[Report]:
    """Examine all in a pool of processes, with a progress bar on a terminal when tqdm is there."""
    fork = multiprocessing.get_context("fork")  # kernels cannot be pickled: the workers inherit the list
    with ProcessPoolExecutor(workers or os.cpu_count(), fork, _inherit, (items,)) as pool:
        yield from _progress(pool.map(_examine_nth, range(len(items))), len(items))


_items: list[tuple[Target, Launch]] = []


def _inherit(items: list[tuple[Target, Launch]]) -> None:
    global _items
    _items = items


def _examine_nth(index: int) -> Report:
    return examine(_items[index])


def _progress(results: Iterable[Report], total: int) -> Iterable[Report]:
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, unit="kernel", disable=not sys.stderr.isatty())


def executed() -> dict[tuple[str, str], str]:
    """(target, label) -> what executing that compiled kernel without a GPU found ("ok"), from the committed results."""
    found = {}
    for file in sorted((RESULTS / "executed").glob("*.json")):
        for row in json.loads(file.read_text())["rows"]:
            found[row["target"], row["label"]] = row["result"]
    return found


def table(reports: list[Report]) -> str:
    """One line for each report, in columns."""
    ran = executed()
    rows = [("target", "launch and tile", "regs", "spill", "KiB", "an SM", "wgmma", "executed", "")]
    for r in reports:
        numbers = ["-" if n is None else str(n) for n in (r.registers, r.spilled)]
        shared = "-" if r.shared is None else f"{r.shared / 1024:.1f}"
        rows.append(
            (r.target, r.label, *numbers, shared, str(r.programs or "-"), str(r.wgmma or ""),
             ran.get((r.target, r.label), ""), "; ".join(r.failures) or "ok")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def write(reports: list[Report], file: Path) -> None:
    """The reports as JSON, a line for each target and kernel: {"target", "rows": {label: numbers and failures}}."""
    groups: dict[tuple[str, str], dict] = {}
    for r in reports:
        numbers = [r.registers, r.spilled, r.shared, r.programs, r.wgmma, *r.failures]
        groups.setdefault((r.target, r.kernel), {})[r.label] = numbers
    lines = ",\n".join(
        json.dumps({"target": t, "rows": rows}, separators=(",", ":")) for (t, _), rows in groups.items()
    )
    columns = [name for name in asdict(Report("", "")) if name not in ("target", "label")]
    head = f'"triton": "{triton.__version__}", "columns": {json.dumps(columns)}'
    file.write_text(f'{{{head}, "groups": [\n{lines}\n]}}\n')


def read(file: Path) -> tuple[str, list[Report]]:
    """(version of triton, reports) of what `write` wrote."""
    document = json.loads(file.read_text())
    rows = [(g["target"], label, numbers) for g in document["groups"] for label, numbers in g["rows"].items()]
    return document["triton"], [Report(t, label, *n[:5], failures=tuple(n[5:])) for t, label, n in rows]


def summary(version: str, reports: list[Report]) -> str:
    """A Markdown table, a row for each target and kernel; of the launches that there are now."""
    ran, there = executed(), Counter((str(t), launch.label.split("/")[0]) for t, launch in launches())
    lines = [
        f"| target, triton {version} | kernel | launches | most registers | spills | most shared memory, KiB "
        "| programs an SM | with wgmma | executed | claims that fail |",
        "| --- | --- |" + " ---: |" * 8,
    ]
    for target, kernel in dict.fromkeys((r.target, r.kernel) for r in reports):
        own = [r for r in reports if (r.target, r.kernel) == (target, kernel)]
        programs = sorted({r.programs or 0 for r in own} - {0})
        many = f"{programs[0]}–{programs[-1]}" if len(programs) > 1 else str(*programs or "–")
        lines.append(
            f"| {target} | {kernel} | {len(own)} of {there[target, kernel]} | {max(r.registers or 0 for r in own)} "
            f"| {sum(bool(r.spilled) for r in own)} | {max(r.shared or 0 for r in own) / 1024:.0f} | {many} "
            f"| {sum(bool(r.wgmma) for r in own) or '–'} "
            f"| {sum(ran.get((r.target, r.label)) == 'ok' for r in own) or '–'} "
            f"| {sum(bool(r.failures) for r in own)} |"
        )
    return "\n".join(lines)


def _target(text: str) -> Target:
    known = {str(t): t for t in TARGETS} | {str(t.arch): t for t in TARGETS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, TARGETS))}")
    return known[text]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastlora.kernels.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one launch of each kernel, for sm_80 and sm_90")
    parser.add_argument("--target", type=_target, action="append", help="cuda:90, hip:gfx942, ...; may be repeated")
    parser.add_argument("--kernel", action="append", help="labels that begin so; may be repeated")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the reports there too, beside what it has of others"
    )
    parser.add_argument("--missing", action="store_true", help="only launches that the file of --json has not")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="compile nothing; what --json wrote, as Markdown")
    parser.add_argument("--workers", type=int, help="processes (default: one for each CPU core)")
    args = parser.parse_args(arguments)
    if args.summary:
        print(summary(*read(args.summary)))
        return 0
    if args.missing and not args.json:
        parser.error("--missing wants --json, the file that says what is there")
    done = {(r.target, r.label) for r in read(args.json)[1]} if args.missing and args.json.exists() else set()
    targets = args.target or (QUICK_TARGETS if args.quick else TARGETS)
    items = [
        item for item in launches(targets, args.quick)
        if (not args.kernel or item[1].label.startswith(tuple(args.kernel)))
        and (str(item[0]), item[1].label) not in done
    ]  # fmt: skip
    reports: list[Report] = []
    for count, report in enumerate(run(items, args.workers), 1):
        reports.append(report)
        if args.json and (count % 50 == 0 or count == len(items)):  # hours on a small machine: what is done is kept
            write(_with_older(reports, args.json), args.json)
    print(table(reports))
    failed = sum(bool(r.failures) for r in reports)
    print(f"{len(reports)} compiled with triton {triton.__version__}, {failed} with a claim that fails")
    return 1 if failed or not (reports or done) else 0


def _with_older(reports: list[Report], file: Path) -> list[Report]:
    """The reports and, of the launches that there still are, those that `file` has of the same compiler."""
    version, older = read(file) if file.exists() else ("", [])
    rows = {(r.target, r.label): r for r in (older if version == triton.__version__ else [])}
    rows |= {(r.target, r.label): r for r in reports}
    return [rows[key] for target, launch in launches() if (key := (str(target), launch.label)) in rows]


if __name__ == "__main__":
    sys.exit(main())
