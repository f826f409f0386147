"""`python -m benchmarks`: measure, report, compare; `gpu` does all that a GPU machine is needed for within a budget."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

CPU_BUDGET_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from fastlora.errors import UserError, WorkError

    try:
        return options.run(options)
    except (UserError, WorkError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(run=_run)
    parser.add_argument("--list", action="store_true", help="name the jobs of this device, in order of importance")
    parser.add_argument("--quick", action="store_true", help="about two minutes: a spread of the suite")
    parser.add_argument("--cases", action="append", help="shell pattern of case or job names; repeatable")
    parser.add_argument("--contenders", action="append", help="measure only these, and the floor; repeatable")
    parser.add_argument("--budget", type=float, help="seconds (default: all on a GPU, 600 on a CPU)")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--output", type=Path, help="folder for results (default: benchmarks/results/<device>)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    report = commands.add_parser("report", help="tables and figures from result files")
    report.add_argument("files", nargs="*", type=Path, help="result files (default: each device's newest)")
    report.add_argument("--readme", type=Path, help="replace the text between this file's two benchmark markers")
    report.add_argument("--plots", action="store_true", help="draw each file's figure beside it")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="two result files; status 1 when one of our rows is slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(run=_compare)

    gpu = commands.add_parser("gpu", help="tests, self-check, sanitizer, suite and tables on a GPU machine")
    gpu.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default 540)")
    gpu.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    gpu.add_argument("--output", type=Path, help="folder for results (default: benchmarks/results/<device>)")
    gpu.set_defaults(run=_gpu)
    return parser


def _device(asked: str | None):
    import torch

    from benchmarks.measure import default_device
    from fastlora.errors import UserError

    try:
        device = default_device() if asked is None else torch.device(asked)
    except RuntimeError:
        raise UserError(f"--device {asked}: not a device; cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here")
    return device


def _run(options: argparse.Namespace) -> int:
    from benchmarks import cases, contenders, plots, report, suite
    from fastlora.errors import UserError

    device = _device(options.device)
    jobs = cases.jobs_for(device)
    jobs = cases.select(cases.quick(jobs) if options.quick else jobs, options.cases)
    if not jobs:
        raise UserError(f"--cases {' '.join(options.cases)}: no job has such a name; --list shows them")
    unknown = set(options.contenders or ()) - contenders.CONTENDERS.keys()
    if unknown:
        raise UserError(f"--contenders {min(unknown)}: needs to be one of {', '.join(contenders.CONTENDERS)}")
    if options.list:
        print("\n".join(f"{job.name}  [{', '.join(job.modes)}]" for job in jobs))
        return 0
    budget = options.budget or (110.0 if options.quick else CPU_BUDGET_S if device.type == "cpu" else math.inf)
    path, payload = suite.run(jobs, device, budget, options.output, options.contenders)
    print(f"\n{report.tables(payload, path)}")
    figure = plots.draw(payload, path.with_suffix(".png"))
    print(f"\nwritten: {path}" + (f", {figure}" if figure else ""))
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks import plots, report

    loaded = [(path, report.load(path)) for path in options.files or report.newest()]
    for path, payload in loaded:
        print(report.tables(payload, path), end="\n\n")
        if options.plots:
            plots.draw(payload, path.with_suffix(".png"))
    if options.readme is not None:
        report.write_readme(options.readme, loaded)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from benchmarks import report

    text, slower = report.compare(report.load(options.before)["rows"], report.load(options.after)["rows"])
    print(text)
    return int(slower > 0)


def _gpu(options: argparse.Namespace) -> int:
    from benchmarks import gpu

    return gpu.main(options.budget, options.dry_run, options.output)


if __name__ == "__main__":
    sys.exit(main())
