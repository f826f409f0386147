"""Two result files, or two commits measured in turns: ratios with their noise, and a verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cases, report
from benchmarks.contenders import ours
from benchmarks.measure import ROOT, default_device, ratio, summary
from fastlora.errors import UserError, WorkError

LEAST = 1.03  # a change smaller than this is never called a regression
SLICE_S = 1.5  # of one job in one process, before the other's turn
ANSWER = "benchmarks-answer: "


@dataclass(frozen=True)
class Change:
    """How one row changed: after over before, each over the bare linear of its own run, and the range of its noise."""

    key: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    ours: bool

    @property
    def regression(self) -> bool:
        """Slower by more than the noise, and by more than what is worth a word; only our own rows count."""
        return self.ours and self.low > 1.0 and self.ratio > LEAST


def changes(before: list[dict], after: list[dict]) -> list[Change]:
    """Rows that both have. Each time is taken over the bare linear of its own job, which cancels the machine's drift;
    the noise is the range between the 20th and 80th percentiles of the two."""
    old = {_key(row): row for row in before if "median" in row}
    found = []
    for row in after:
        mate = old.get(_key(row))
        if mate is None or "over_bare" not in row or "over_bare" not in mate or row["contender"] == "bare":
            continue
        new, past = row["over_bare"], mate["over_bare"]
        found.append(
            Change(
                _key(row), mate["median"], row["median"], new["median"] / past["median"], new["p20"] / past["p80"],
                new["p80"] / past["p20"], ours(row["contender"]),
            )
        )  # fmt: skip
    return found


def verdict(found: list[Change]) -> str:
    """A line for each change, the slowest first, and the regressions last."""
    lines = [f"{'job, contender':<84} {'before':>10} {'after':>10}  ratio over bare (20-80 %)"]
    for one in sorted(found, key=lambda one: -one.ratio):
        mark = "  REGRESSION" if one.regression else ""
        lines.append(
            f"{one.key:<84} {one.before * 1e6:8.1f}us {one.after * 1e6:8.1f}us"
            f"  {one.ratio:.3f} ({one.low:.3f}-{one.high:.3f}){mark}"
        )
    slower = sum(one.regression for one in found)
    lines.append(f"{len(found)} rows compared, {slower} slower past the noise")
    return "\n".join(lines)


def main(a: str, b: str, patterns: list[str] | None, budget_s: float) -> int:
    """Compare and print; 1 when one of our rows is slower past the noise.

    Raises:
        UserError: a file or commit that is not there, or no row in common.
    """
    if Path(a).is_file() and Path(b).is_file():
        before, after = report.load(Path(a))["rows"], report.load(Path(b))["rows"]
        if patterns:
            before, after = (
                [row for row in rows if cases.matches(_job(row), row["case"], patterns)] for rows in (before, after)
            )
    elif Path(a).suffix == ".json" or Path(b).suffix == ".json":
        raise UserError(f"{a} {b}: need two result files that exist, or two commits")
    else:
        before, after = _commits(a, b, patterns, budget_s)
    found = changes(before, after)
    if not found:
        raise UserError("the two have no row in common")
    print(verdict(found))
    return int(any(one.regression for one in found))


def work() -> int:
    """The measuring process: a request per line of standard input, an answer per line of standard output."""
    from benchmarks.measure import warm_clocks
    from benchmarks.runner import run_job

    device = default_device()
    warm_clocks(device)
    jobs = {job.name: job for job in cases.jobs_for(device)}
    for line in sys.stdin:
        request = json.loads(line)
        job = cases.plain(jobs[request["job"]])
        rows = run_job(job, device, request["budget"], only=["eager", "fastlora"], keep_samples=True)
        print(ANSWER + json.dumps(rows), flush=True)
    return 0


def _commits(a: str, b: str, patterns: list[str] | None, budget_s: float) -> tuple[list[dict], list[dict]]:
    """Measure the package of two commits with this tree's benchmarks, in two processes that take turns."""
    commits = [_commit(name) for name in (a, b)]
    jobs = cases.jobs_for(default_device())
    jobs = cases.select(jobs, patterns) if patterns else cases.quick(jobs)
    if not jobs:
        raise UserError("no job matches --cases; `python -m benchmarks list` names them")
    end = time.perf_counter() + budget_s
    pooled: tuple[list[dict], list[dict]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        sides = [_Side(Path(folder) / label, commit) for label, commit in zip("ab", commits, strict=True)]
        try:
            for index, job in enumerate(jobs):
                share = (end - time.perf_counter()) / (len(jobs) - index)
                turns = max(1, min(6, round(share / (4 * SLICE_S))))
                answers = ([], [])
                for turn in range(2 * turns):  # a b b a a b b a
                    side = (turn + 1) // 2 % 2
                    answers[side].append(sides[side].measure(job.name, SLICE_S))
                for side in (0, 1):
                    pooled[side].extend(_pool(answers[side]))
                print(f"measured {job.name}", file=sys.stderr, flush=True)
                if time.perf_counter() > end:
                    print(f"the budget is spent: {len(jobs) - index - 1} jobs left out", file=sys.stderr)
                    break
        finally:
            for side in sides:
                side.close()
    return pooled


def _pool(answers: list[list[dict]]) -> list[dict]:
    """One row per contender from the samples of all its turns."""
    rows = {}
    for row in (row for answer in answers for row in answer if "seconds" in row):
        key = (row["contender"], row["mode"])
        if key in rows:
            rows[key]["seconds"] += row["seconds"]
        else:
            rows[key] = dict(row)
    for (_, mode), row in rows.items():
        row |= summary(row["seconds"]) | {"over_bare": ratio(row["seconds"], rows["bare", mode]["seconds"])}
    return list(rows.values())


class _Side:
    """A process that measures one commit's package: a worktree of the commit, beside this tree's benchmarks."""

    def __init__(self, folder: Path, commit: str):
        self.tree = folder / "tree"
        folder.mkdir()
        _git("worktree", "add", "--detach", "--quiet", str(self.tree), commit)
        (folder / "fastlora").symlink_to(self.tree / "fastlora")
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "worker"], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def measure(self, job: str, budget_s: float) -> list[dict]:
        try:
            self.process.stdin.write(json.dumps({"job": job, "budget": budget_s}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line[len(ANSWER) :])
        raise WorkError(f"the process measuring {self.tree.name} of {job} ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        _git("worktree", "remove", "--force", str(self.tree))


def _commit(name: str) -> str:
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except WorkError:
        raise UserError(f"{name}: neither a result file nor a commit") from None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise WorkError(f"git {arguments[0]}: {detail.strip()}") from None


def _job(row: dict) -> str:
    return f"{row['case']}/{row['direction']}"


def _key(row: dict) -> str:
    return f"{_job(row)} {row['contender']} {row['mode']}"
