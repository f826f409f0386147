"""Projections that share x, apart (`lora_linear` on each, autograd sums dX) and together (`lora_linears`), in turns.

    python -m benchmarks.shared [--seconds 120] [--device cpu] [--write]

Forward and backward; the ratio is taken round by round. Beside it stands what the traffic model says of the bytes that
are moved, for the path that runs here and for `hybrid` on a GPU. On a CPU the time is the process's own, which other
programs on the machine do not add to. `--write` puts benchmarks/results/<device>/<date>-shared.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import DTYPES, SHORT
from benchmarks.measure import default_device, device_name, metadata, ratio, summary, write_results
from fastlora import lora_linear, lora_linears, roofline
from fastlora.choice import select

SAMPLE_S = 0.05  # of one contender in a round


@dataclass(frozen=True)
class Case:
    """x (M, K) and projections to N columns each, all of rank R."""

    name: str
    M: int
    K: int
    N: tuple[int, ...]
    R: int
    dtype: str
    dropout: float

    @property
    def works(self) -> list[roofline.Work]:
        size = DTYPES[self.dtype].itemsize
        return [roofline.Work(self.M, N, self.K, self.R, size, self.dropout > 0) for N in self.N]


def cases(device: str) -> list[Case]:
    """Query, key and value of the classifiers; on a GPU those of Llama-3 8B, and its gate and up, as well."""
    shapes = [("tiny qkv", 64, 128, (128,) * 3, 8), ("BERT qkv", 960, 768, (768,) * 3, 16)]
    if device == "cuda":
        shapes += [("Llama-3 8B qkv", 8192, 4096, (4096, 1024, 1024), 16)]
        shapes += [("Llama-3 8B gate, up", 8192, 4096, (14336,) * 2, 16)]
    dtypes = ("bfloat16", "float32")
    return [Case(*shape, dtype, p) for shape in shapes for dtype in dtypes for p in (0.0, 0.1)]


def contenders(case: Case, device: torch.device) -> dict:
    """Steps of `apart` and `together` on the same tensors."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1.0, learns: bool = False) -> torch.Tensor:
        t = (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        return t.requires_grad_(learns)

    x = normal(case.M, case.K, learns=True)
    many = [
        (
            normal(N, case.K, scale=case.K**-0.5),
            normal(case.R, case.K, scale=case.K**-0.5, learns=True),
            normal(N, case.R, learns=True),
            normal(N),
            2.0,
        )
        for N in case.N
    ]
    dys, leaves = [normal(case.M, N) for N in case.N], [x, *(t for one in many for t in one[1:3])]

    def apart() -> None:
        torch.autograd.grad([lora_linear(x, *one, case.dropout) for one in many], leaves, dys)

    def together() -> None:
        torch.autograd.grad(lora_linears(x, many, case.dropout), leaves, dys)

    paths = {select(x, one[0], one[1], case.dropout, None).name for one in many}
    return {"steps": {"apart": apart, "together": together}, "path": "/".join(sorted(paths))}


def measure(steps: dict, seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, in rounds of shuffled order."""

    def sample(step, calls: int) -> float:
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / calls

    for step in steps.values():
        step(), step()
    calls = max(1, round(SAMPLE_S / max(sample(steps["apart"], 3), 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffler, end = list(steps), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["apart"]) < 7:
        shuffler.shuffle(order)
        for name in order:
            found[name].append(sample(steps[name], calls))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for all cases (default 120)")
    parser.add_argument(
        "--device", default=default_device().type, help="cpu or cuda (default: the GPU if there is one)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default 1)")
    parser.add_argument("--write", action="store_true", help="keep the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    print(f"{device_name(device)}; microseconds of forward and backward, and the ratio of together to apart")
    print(f"{'':38} path     apart  together  ratio (20-80 %)     bytes  bytes of hybrid")
    all_cases = cases(device.type)
    for case in all_cases:
        made = contenders(case, device)
        found = measure(made["steps"], args.seconds / len(all_cases), device)
        over = ratio(found["together"], found["apart"])
        path = made["path"]
        moved = {
            name: roofline.moved(roofline.together(name, case.works)) / roofline.moved(roofline.apart(name, case.works))
            for name in dict.fromkeys((path, "hybrid"))
        }
        micro = {name: statistics.median(seconds) * 1e6 for name, seconds in found.items()}
        label = f"{case.name} {case.M}x{case.K} {SHORT[case.dtype]} p={case.dropout:g}"
        print(
            f"{label:38} {path:6} {micro['apart']:8.1f} {micro['together']:8.1f}   {over['median']:.3f} "
            f"({over['p20']:.3f}-{over['p80']:.3f})  {moved[path]:.2f}  {moved['hybrid']:.2f}",
            flush=True,
        )
        times = {name: summary(seconds) for name, seconds in found.items()}
        rows.append({"case": asdict(case), "path": path, "seconds": times, "ratio": over, "bytes, predicted": moved})
    if args.write:
        print(write_results("shared", {"metadata": metadata(device), "kind": "shared", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
