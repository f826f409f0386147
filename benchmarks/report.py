"""Tables and the README's section from result files: no number here is without a raw file behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.cases import COMPILED, FORWARD, GRAPH, PLAIN, TRAIN
from benchmarks.measure import RESULTS, ROOT
from fastlora.dispatch.registry import NAMES as PATHS
from fastlora.errors import UserError

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
RIVALS = ("eager", "peft", "peft-float32", "optimised", "lorafusion")
LOST_BEYOND = 1.03  # of the faster one's time; nearer than this two contenders are level
Row = dict


def load(path: Path) -> dict:
    """The content of a suite's result file.

    Raises:
        UserError: it cannot be read, or is not one.
    """
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(payload, dict) or payload.get("kind") != "suite":
        raise UserError(f"{path}: not a result file of the suite")
    return payload


def newest(results: Path = RESULTS) -> list[Path]:
    """The newest suite file of every device that has one."""
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        for path in sorted(folder.glob("*.json"), reverse=True):
            try:
                load(path)
            except UserError:
                continue
            found.append(path)
            break
    if not found:
        raise UserError(f"no result file of the suite under {results}; `python -m benchmarks` makes one")
    return found


def tables(payload: dict, path: Path) -> str:
    """Everything in a result file as Markdown: tables by direction and mode, means, and the shapes that are lost."""
    parts = [provenance(payload, path)]
    for direction in (TRAIN, FORWARD):
        for mode in (PLAIN, COMPILED, GRAPH):
            groups = grouped(payload["rows"], direction, mode)
            if groups:
                parts.append(f"**{direction}, {mode}** (times over the bare linear)\n\n{table(groups)}")
            if groups and mode == PLAIN:
                parts.append(costs(groups))
    parts.append(means(payload["rows"]))
    parts.append(lost(payload["rows"]))
    return "\n\n".join(part for part in parts if part)


def provenance(payload: dict, path: Path) -> str:
    """Device, versions, commit, date and file of a result, in a sentence."""
    data = payload["metadata"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if name != "numpy")
    device = data["device_name"] + (f", {data['cores']} cores" if "cores" in data else "")
    if "driver_version" in data:
        device += f", driver {data['driver_version']}"
    commit = (data["commit"] or "unknown")[:10] + (" with uncommitted changes" if data["uncommitted_changes"] else "")
    shown = Path(path).resolve()
    shown = shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown.name
    busy = data.get("load_before") or 0.0
    if busy > 0.5 * data.get("cores", 1):
        device += f" (BUSY: a load of {busy:.1f} when it began)"
    choosing = f"; choosing a path takes {payload['choosing_s'] * 1e6:.1f} µs a call" if "choosing_s" in payload else ""
    left = f"; {len(payload['left_out'])} jobs left out for want of time" if payload["left_out"] else ""
    left += f"; {len(payload['failed'])} jobs failed" if payload.get("failed") else ""
    return f"{device}; {versions}; commit {commit}; {data['date'][:10]}; raw: `{shown}`{choosing}{left}."


def grouped(rows: list[Row], direction: str, mode: str) -> dict[str, dict[str, Row]]:
    """{case: {contender: row}} of one direction and mode, skipped rows left out, where fastlora was measured."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["direction"] == direction and row["mode"] == mode and "median" in row:
            groups.setdefault(row["case"], {})[row["contender"]] = row
    return {case: group for case, group in groups.items() if "bare" in group and len(group) > 1}


def table(groups: dict[str, dict[str, Row]]) -> str:
    """A Markdown table: the floor in microseconds, every contender over it, the prediction, and the gain over eager."""
    present = {name for group in groups.values() for name in group}
    columns = [name for name in (*RIVALS, *PATHS) if name in present]
    heads = ["case", "bare, µs", *columns]
    if "fastlora-float32" in present:
        heads.append("fastlora, float32 adapters")
    heads += ["**fastlora**", "path", "predicted", "20–80 %", "eager ÷ fastlora"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for case, group in groups.items():
        cells = [case, f"{group['bare']['median'] * 1e6:.0f}", *(_over(group.get(name)) for name in columns)]
        if "fastlora-float32" in present:
            cells.append(_over(group.get("fastlora-float32")))
        mine = group.get("fastlora")
        cells += [
            f"**{_over(mine)}**",
            mine.get("path", "–") if mine else "–",
            _predicted(mine),
            _spread(mine),
            _gain(mine),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(groups: dict[str, dict[str, Row]]) -> str:
    """A Markdown table of what fastlora's and eager's calls cost besides time, and the rates they reach."""
    lines = [
        "| case | TFLOP/s | GB/s | peak memory, MiB | eager's | launches | predicted | eager's |",
        "| --- |" + " ---: |" * 7,
    ]
    for case, group in groups.items():
        mine, eager = group.get("fastlora"), group.get("eager", {})
        if mine:
            memory = (_mib(row.get("peak_memory_bytes")) for row in (mine, eager))
            launches = (mine.get("launches", "–"), mine.get("predicted_launches", "–"), eager.get("launches", "–"))
            rates = f"{mine['tflops']:.2f}", f"{mine['bytes_per_s'] / 1e9:.0f}"
            lines.append("| " + " | ".join(map(str, (case, *rates, *memory, *launches))) + " |")
    return "\n".join(lines)


def means(rows: list[Row]) -> str:
    """Geometric means of eager's time over fastlora's, by direction, mode and dtype."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        if row["contender"] == "fastlora" and "over_eager" in row:
            found.setdefault((row["direction"], row["mode"], row["dtype"]), []).append(row["over_eager"]["median"])
    if not found:
        return ""
    lines = [
        "| direction | calls | dtype | cases | eager ÷ fastlora, geometric mean | worst |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for (direction, mode, dtype), ratios in found.items():
        mean = math.exp(-sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"| {direction} | {mode} | {dtype} | {len(ratios)} | {mean:.2f} | {1 / max(ratios):.2f} |")
    return "\n".join(lines)


def losses(rows: list[Row]) -> list[tuple[Row, str, float]]:
    """Where fastlora is slower than a rival in the same mode: (fastlora's row, who is fastest, our time over his)."""
    found = []
    for direction in (TRAIN, FORWARD):
        for mode in (PLAIN, COMPILED, GRAPH):
            for group in grouped(rows, direction, mode).values():
                rivals = {name: row["median"] for name, row in group.items() if name in RIVALS}
                if "fastlora" in group and rivals:
                    best = min(rivals, key=rivals.__getitem__)
                    over = group["fastlora"]["median"] / rivals[best]
                    if over > LOST_BEYOND:
                        found.append((group["fastlora"], best, over))
    return sorted(found, key=lambda one: -one[2])


def lost(rows: list[Row]) -> str:
    """The lost shapes as a Markdown list, or the statement that there are none."""
    found = losses(rows)
    if not found:
        return f"No measured shape at which a rival is more than {LOST_BEYOND - 1:.0%} faster."
    lines = [f"Shapes at which a rival is more than {LOST_BEYOND - 1:.0%} faster:", ""]
    lines += [
        f"- {row['case']}, {row['direction']}, {row['mode']}: {best} is {over:.2f}× faster" for row, best, over in found
    ]
    return "\n".join(lines)


def readme_section(loaded: list[tuple[Path, dict]]) -> str:
    """The README's text: for each device the training step's table, the means, the lost shapes and the file."""
    parts = []
    for path, payload in loaded:
        parts.append(f"### {payload['metadata']['device_name']}" + _cores(payload) + "\n\n" + provenance(payload, path))
        figure = Path(path).with_suffix(".png").resolve()
        if figure.exists() and figure.is_relative_to(ROOT):
            parts.append(f"![roofline, overhead and speed-up]({figure.relative_to(ROOT).as_posix()})")
        groups = grouped(payload["rows"], TRAIN, PLAIN)
        shown = {case: group for case, group in groups.items() if group["bare"]["dtype"] != "float16"}
        if shown:
            parts.append("Forward and backward, times over the bare frozen linear; less is better:\n\n" + table(shown))
        parts += [means(payload["rows"]), lost(payload["rows"])]
    return "\n\n".join(part for part in parts if part)


def write_readme(path: Path, loaded: list[tuple[Path, dict]]) -> None:
    """Replace what stands between the README's two markers.

    Raises:
        UserError: it cannot be read, or lacks a marker.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: needs the two lines {BEGIN} and {END}")
    path.write_text(f"{head}{BEGIN}\n\n{readme_section(loaded)}\n\n{END}{tail}", encoding="utf-8")


def short(rows: list[Row], most: int = 24) -> str:
    """The first measured training steps as plain text, best mode first: what a terminal's last screen can hold."""
    mode = GRAPH if any(row["mode"] == GRAPH for row in rows) else PLAIN
    groups = grouped(rows, TRAIN, mode)
    lines = [
        f"forward+backward, {mode}: times over the bare linear",
        f"{'case':<44}{'bare us':>9}{'eager':>7}{'ours':>7}{'pred.':>7}  path",
    ]
    for case, group in list(groups.items())[:most]:
        mine = group.get("fastlora")
        times = f"{_over(group.get('eager')):>7}{_over(mine):>7}{_predicted(mine):>7}"
        lines.append(f"{case:<44}{group['bare']['median'] * 1e6:9.0f}{times}  {mine['path'] if mine else '-'}")
    return "\n".join(lines)


def _cores(payload: dict) -> str:
    cores = payload["metadata"].get("cores")
    return f", {cores} cores" if cores else ""


def _mib(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**20:.1f}"


def _over(row: Row | None) -> str:
    return f"{row['over_bare']['median']:.2f}" if row and "over_bare" in row else "–"


def _spread(row: Row | None) -> str:
    return f"{row['over_bare']['p20']:.2f}–{row['over_bare']['p80']:.2f}" if row and "over_bare" in row else "–"


def _predicted(row: Row | None) -> str:
    return f"{row['predicted_over_bare']:.2f}" if row and "predicted_over_bare" in row else "–"


def _gain(row: Row | None) -> str:
    return f"{1 / row['over_eager']['median']:.2f}" if row and "over_eager" in row else "–"
