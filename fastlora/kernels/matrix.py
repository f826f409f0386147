"""Compile every kernel, with every tile that its launcher can choose, for every target: with no GPU.

    python -m fastlora.kernels.matrix [--quick] [--target cuda:90] [--kernel gemm] [--json FILE]

Triton's offline compiler and `cuobjdump -res-usage` tell, before any GPU is seen, what a launch would find there:
registers and stack of each thread, shared memory, the instructions used. The claims, any of which makes the exit
status 1 when it fails:

- it compiles;
- it keeps everything in registers (CUDA: no stack; HIP: no spilled vector registers);
- its shared memory, and on sm_100 its tensor memory, is within the architecture's limit;
- where the specimen says so, sm_90 multiplies by `wgmma`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastlora import env
from fastlora.kernels.specimen import Specimen
from fastlora.kernels.tiles import TARGETS, Target

KERNELS = ("gemm", "small")
MODULES = {kernel: f"fastlora.kernels.{kernel}_specimens" for kernel in KERNELS}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_MEMORY_LIMIT = 512  # columns of sm_100; the compiler says what it needs and leaves the refusal to the launch
_items: list[tuple[str, Specimen]] = []
QUICK_TARGETS = (Target("cuda", 80), Target("cuda", 90))


@dataclass(frozen=True)
class Report:
    """What the compiler said of one specimen; `failures` lists the claims that do not hold."""

    kernel: str
    label: str
    target: str
    tile: str
    registers: int | None
    spilled: int | None
    shared: int | None
    shared_limit: int
    wgmma: int
    seconds: float
    failures: tuple[str, ...]


def specimens(
    targets: Iterable[Target] = TARGETS, kernels: Iterable[str] = KERNELS, quick: bool = False
) -> Iterator[tuple[str, Specimen]]:
    """(kernel, specimen) of every launch to compile; `quick` keeps the first of each kernel, dtype and alignment."""
    for kernel in kernels:
        module = importlib.import_module(MODULES[kernel])
        for make in getattr(module, "SPECIMENS", ()):
            for target in targets:
                for dtype, adapter_dtype, aligned in _layouts(target, quick):
                    for count, specimen in enumerate(make(target, dtype, adapter_dtype, aligned)):
                        if quick and count:
                            break
                        yield kernel, specimen


def _layouts(target: Target, quick: bool) -> Iterator[tuple[torch.dtype, torch.dtype, bool]]:
    """(dtype, adapter dtype, aligned); float32 adapters beside bfloat16, which is how mixed precision meets them."""
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and not target.has_bfloat16:
            continue
        if quick and dtype == torch.float16:
            continue
        for aligned in (True, False):
            yield dtype, dtype, aligned
            if dtype == torch.bfloat16 and not quick:
                yield dtype, torch.float32, aligned


def compiled(specimen: Specimen):
    """The specimen through Triton's compiler, specialised as its launcher's own call would be."""
    if env.interpreting():
        raise RuntimeError("TRITON_INTERPRET replaces the compiler that the matrix is about: unset it")
    target = specimen.target
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    bind = create_function_from_signature(specimen.fn.signature, specimen.fn.params, backend)
    options = {**specimen.tile.options, **specimen.options}
    bound, specialization, _ = bind(**specimen.args, **options)
    parsed, signature, constants, attrs = specimen.fn._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(specimen.fn, signature, constants, attrs)
    return triton.compile(source, target=gpu, options=parsed.__dict__)


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


def examine(item: tuple[str, Specimen]) -> Report:
    """Compile one specimen and hold it against the claims."""
    kernel, specimen = item
    target, tile = specimen.target, specimen.tile
    started = time.perf_counter()
    registers = spilled = shared = None
    wgmma, failures = 0, []
    try:
        binary = compiled(specimen)
        registers, spilled = _usage(binary, target)
        shared = binary.metadata.shared
        wgmma = binary.asm["ptx"].count("wgmma.mma_async") if target.backend == "cuda" else 0
    except Exception as error:  # the compiler raises whatever its passes raise; the matrix reports and goes on
        failures.append(f"does not compile: {type(error).__name__}: {error}".splitlines()[0][:200])
    else:
        if spilled:
            failures.append(f"spills {spilled} {'bytes' if target.backend == 'cuda' else 'registers'}")
        if shared > target.shared_limit:
            failures.append(f"takes {shared} bytes of shared memory, {target.shared_limit} there are")
        if getattr(binary.metadata, "tmem_size", 0) > TENSOR_MEMORY_LIMIT:
            failures.append(f"takes {binary.metadata.tmem_size} of {TENSOR_MEMORY_LIMIT} columns of tensor memory")
        if specimen.wgmma and not wgmma:
            failures.append("has no wgmma")
    cut = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    cut += " tma" if tile.tma else ""
    return Report(
        kernel, specimen.label, str(target), cut, registers, spilled, shared, target.shared_limit, wgmma,
        round(time.perf_counter() - started, 2), tuple(failures),
    )  # fmt: skip


def run(items: list[tuple[str, Specimen]], workers: int | None = None) -> list[Report]:
    """Examine all in a pool of processes, with a progress bar on a terminal when tqdm is there."""
    fork = multiprocessing.get_context("fork")  # kernels cannot be pickled: the workers inherit the list
    with ProcessPoolExecutor(workers or os.cpu_count(), fork, _inherit, (items,)) as pool:
        return list(_progress(pool.map(_examine_nth, range(len(items))), len(items)))


def _inherit(items: list[tuple[str, Specimen]]) -> None:
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


def table(reports: list[Report]) -> str:
    """One line for each report, in columns."""
    rows = [("kernel", "target", "specimen", "tile", "regs", "spill", "shared", "of KiB", "wgmma", "")]
    for r in reports:
        numbers = ["-" if n is None else str(n) for n in (r.registers, r.spilled)]
        shared = "-" if r.shared is None else f"{r.shared / 1024:.1f}"
        rows.append(
            (r.kernel, r.target, r.label, r.tile, *numbers, shared, str(r.shared_limit // 1024), str(r.wgmma or ""),
             "; ".join(r.failures) or "ok")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def summary(document: dict) -> str:
    """A Markdown table, a row for each target and kernel, of what `--json` wrote."""
    lines = [
        f"| target, triton {document['triton']} | kernels | launches | most registers | spills "
        "| most shared memory, KiB | with wgmma | claims that fail |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    reports = [Report(**fields) for fields in document["reports"]]
    for target, kernel in dict.fromkeys((r.target, r.kernel) for r in reports):
        own = [r for r in reports if (r.target, r.kernel) == (target, kernel)]
        shared = max(r.shared or 0 for r in own) / 1024
        lines.append(
            f"| {target} | {kernel} | {len(own)} | {max(r.registers or 0 for r in own)} "
            f"| {sum(bool(r.spilled) for r in own)} | {shared:.0f} of {own[0].shared_limit // 1024} "
            f"| {sum(bool(r.wgmma) for r in own) or '–'} | {sum(bool(r.failures) for r in own)} |"
        )
    return "\n".join(lines)


def _target(text: str) -> Target:
    known = {str(t): t for t in TARGETS} | {str(t.arch): t for t in TARGETS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, TARGETS))}")
    return known[text]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastlora.kernels.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tile of each kernel, for sm_80 and sm_90")
    parser.add_argument("--target", type=_target, action="append", help="cuda:90, hip:gfx942, ...; may be repeated")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="compile nothing; what --json wrote, as Markdown")
    parser.add_argument("--workers", type=int, help="processes (default: one for each CPU core)")
    args = parser.parse_args(arguments)
    if args.summary:
        print(summary(json.loads(args.summary.read_text())))
        return 0
    targets = args.target or (QUICK_TARGETS if args.quick else TARGETS)
    reports = run(list(specimens(targets, args.kernel or KERNELS, args.quick)), args.workers)
    print(table(reports))
    failed = sum(bool(r.failures) for r in reports)
    print(f"{len(reports)} compiled with triton {triton.__version__}, {failed} with a claim that fails")
    if args.json:
        lines = ",\n".join(json.dumps(dataclasses.asdict(r)) for r in reports)  # one a line, for `diff`
        args.json.write_text(f'{{"triton": "{triton.__version__}", "reports": [\n{lines}\n]}}\n')
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
