"""`python -m benchmarks`: measure, report, compare, tune; `gpu` does all of it on a GPU machine within a budget."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

CPU_BUDGET_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    from fastlora.errors import UserError, WorkError

    try:
        return options.run(options)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    _add_suite(parser)
    parser.set_defaults(run=_run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    listing = commands.add_parser("list", help="name the jobs of this device, in the order in which they run")
    listing.set_defaults(run=_list)
    _add_suite(listing)

    report = commands.add_parser("report", help="tables and plots from result files; the README's table")
    report.add_argument("files", nargs="*", type=Path, help="result files (default: each device's newest)")
    report.add_argument("--readme", type=Path, help="replace the text between the README's two benchmark markers")
    report.add_argument("--plots", action="store_true", help="draw each file's figure beside it")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="two result files, or two commits measured in turns")
    compare.add_argument("a", help="result file or commit: before")
    compare.add_argument("b", help="result file or commit: after")
    compare.add_argument("--cases", action="append", help="shell pattern of case or job names; repeatable")
    compare.add_argument("--budget", type=float, default=120.0, help="seconds for two commits (default 120)")
    compare.set_defaults(run=_compare)

    tune = commands.add_parser("tune", help="measure the usable paths and write this device's table")
    tune.add_argument("--budget", type=float, default=120.0, help="seconds (default 120)")
    tune.add_argument("--output", type=Path, help="the table's file (default: the package's own)")
    tune.set_defaults(run=_tune)

    gpu = commands.add_parser("gpu", help="tests, self-check, sanitizer, tuning, suite and table on a GPU machine")
    gpu.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default 540)")
    gpu.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    gpu.add_argument("--output", type=Path, help="folder for results (default: benchmarks/results/<device>)")
    gpu.set_defaults(run=_gpu)

    worker = commands.add_parser("worker")
    worker.set_defaults(run=_worker)
    return parser


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="about two minutes: a spread of the suite")
    parser.add_argument("--cases", action="append", help="shell pattern of case or job names; repeatable")
    parser.add_argument("--contenders", action="append", help="measure only these, and the floor; repeatable")
    parser.add_argument("--budget", type=float, help="seconds (default: all on a GPU, 600 on a CPU)")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--output", type=Path, help="folder for results (default: benchmarks/results/<device>)")


def _device(options: argparse.Namespace):
    import torch

    from benchmarks.measure import default_device
    from fastlora.errors import UserError

    if options.device is None:
        return default_device()
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise UserError(f"--device {options.device}: not a device; cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here")
    return device


def _jobs(options: argparse.Namespace, device) -> list:
    from benchmarks import cases
    from fastlora.errors import UserError

    jobs = cases.jobs_for(device)
    if options.quick:
        jobs = cases.quick(jobs)
    jobs = cases.select(jobs, options.cases)
    if not jobs:
        raise UserError(f"no job matches --cases {' '.join(options.cases)}; `python -m benchmarks list` names them")
    return jobs


def _list(options: argparse.Namespace) -> int:
    for job in _jobs(options, _device(options)):
        print(f"{job.name}  [{', '.join(job.modes)}]")
    return 0


def _run(options: argparse.Namespace) -> int:
    from benchmarks import plots, report, suite

    device = _device(options)
    budget = options.budget or (110.0 if options.quick else CPU_BUDGET_S if device.type == "cpu" else math.inf)
    path, payload = suite.run(_jobs(options, device), device, budget, options.output, options.contenders)
    print()
    print(report.tables(payload, path))
    figure = plots.draw(payload, path.with_suffix(".png"))
    print(f"\nwritten: {path}" + (f", {figure}" if figure else ""))
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks import plots, report

    files = options.files or report.newest()
    loaded = [(path, report.load(path)) for path in files]
    for path, payload in loaded:
        print(report.tables(payload, path), end="\n\n")
        if options.plots:
            plots.draw(payload, path.with_suffix(".png"))
    if options.readme is not None:
        report.write_readme(options.readme, loaded)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from benchmarks import compare

    return compare.main(options.a, options.b, options.cases, options.budget)


def _tune(options: argparse.Namespace) -> int:
    from benchmarks import tune

    return tune.main(options.budget, options.output)


def _gpu(options: argparse.Namespace) -> int:
    from benchmarks import gpu

    return gpu.main(options.budget, options.dry_run, options.output)


def _worker(options: argparse.Namespace) -> int:
    from benchmarks import compare

    return compare.work()


if __name__ == "__main__":
    sys.exit(main())
