"""Tables from result files, and the comparison of two: no number here is without a raw file behind it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from benchmarks.cases import COMPILED, FORWARD, GRAPH, PLAIN, TRAIN
from benchmarks.contenders import CONTENDERS, RIVALS
from benchmarks.measure import RESULTS, ROOT
from fastlora.errors import UserError

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
SEVERAL = ", of eight adapters at once or of three projections that share x"
VARIANTS = ", over NF4 with double quantisation or with DoRA"
LEVEL = 1.03  # nearer than this two times are level: no loss, no regression
Row = dict
Group = dict[str, Row]  # by contender


def load(path: Path, kind: str = "suite") -> dict:
    """The content of a result file of the suite, or of another kind.

    Raises:
        UserError: it cannot be read, or is not one.
    """
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(payload, dict) or payload.get("kind") != kind:
        raise UserError(f"{path}: not a result file of the {kind}")
    return payload


def newest(results: Path = RESULTS) -> list[Path]:
    """The newest suite file of every device that has one."""
    suites = (sorted(folder.glob("????-??-??-??????.json")) for folder in sorted(results.glob("*")))
    found = [files[-1] for files in suites if files]
    if not found:
        raise UserError(f"no result file of the suite under {results}; `python -m benchmarks` makes one")
    return found


def tables(payload: dict, path: Path) -> str:
    """Everything in a result file as Markdown: tables by direction and mode, means, and the shapes that are lost."""
    parts = [provenance(payload, path)]
    for direction, mode, groups in _sections(payload["rows"]):
        for kind, some in kinds(groups).items():
            parts.append(f"**{direction}, {mode}{kind}** (times over the bare linear)\n\n{table(some)}")
        if mode == PLAIN:
            parts.append(costs(groups))
    return "\n\n".join([*parts, means(payload["rows"]), lost(payload["rows"])])


def provenance(payload: dict, path: Path) -> str:
    """Device, versions, commit, date and file of a result, in a sentence."""
    data = payload["metadata"]
    said = [data["device_name"], ", ".join(f"{name} {version}" for name, version in data["versions"].items())]
    if "cores" in data:
        said[0] += f", {data['cores']} cores"
    if "driver_version" in data:
        said[0] += f", driver {data['driver_version']}"
    if (busy := data.get("load_before") or 0.0) > 0.5 * data.get("cores", 1):
        said[0] += f" (BUSY: a load of {busy:.1f} when it began)"
    changed = " with uncommitted changes" if data["uncommitted_changes"] else ""
    said += [f"commit {(data['commit'] or 'unknown')[:10]}{changed}", data["date"][:10], f"raw: `{_in_tree(path)}`"]
    if "choosing_s" in payload:
        said.append(f"choosing a path takes {payload['choosing_s'] * 1e6:.1f} µs a call")
    if payload.get("left_out"):
        said.append(f"{len(payload['left_out'])} jobs left out for want of time")
    if payload.get("failed"):
        said.append(f"{len(payload['failed'])} jobs failed")
    return "; ".join(said) + "."


def grouped(rows: list[Row], direction: str, mode: str) -> dict[str, Group]:
    """{case: {contender: row}} of one direction and mode, where the floor and another were measured."""
    groups: dict[str, Group] = {}
    for row in rows:
        if row["direction"] == direction and row["mode"] == mode and "median" in row:
            groups.setdefault(row["case"], {})[row["contender"]] = row
    return {case: group for case, group in groups.items() if "bare" in group and len(group) > 1}


def kinds(groups: dict[str, Group]) -> dict[str, dict[str, Group]]:
    """The cases of plain LoRA, those over a quantised base or with DoRA, and those of several at once, each where there
    are some."""
    found: dict[str, dict[str, Group]] = {}
    for case, group in groups.items():
        several = any(group["bare"].get(many, 1) > 1 for many in ("adapters", "projections"))
        kind = SEVERAL if several else VARIANTS if _variant(group["bare"]) else ""
        found.setdefault(kind, {})[case] = group
    return found


def table(groups: dict[str, Group]) -> str:
    """The floor in microseconds, every contender over it, what is predicted of us, and the gain over eager."""
    present = {name for group in groups.values() for name in group}
    columns = [name for name in CONTENDERS if name in present and name not in ("bare", "fastlora")]
    heads = ["case", "bare, µs", *columns, "**fastlora**", "path", "predicted", "20–80 %", "eager ÷ fastlora"]
    lines = []
    for case, group in groups.items():
        mine = group.get("fastlora", {})
        spread = "{p20:.2f}–{p80:.2f}".format(**mine["over_bare"]) if mine else "–"
        gain = f"{1 / mine['over_eager']['median']:.2f}" if "over_eager" in mine else "–"
        over = [_over(group.get(name)) for name in columns]
        said = [f"**{_over(mine)}**", mine.get("path", "–"), _figure(mine, "predicted_over_bare"), spread, gain]
        lines.append([case, f"{group['bare']['median'] * 1e6:.0f}", *over, *said])
    return _markdown(heads, lines)


def costs(groups: dict[str, Group]) -> str:
    """What fastlora's and eager's calls cost besides time, and the rates they reach."""
    heads = ["case", "TFLOP/s", "GB/s", "peak memory, MiB", "eager's", "launches", "predicted", "eager's"]
    lines = []
    for case, group in groups.items():
        mine, eager = group.get("fastlora"), group.get("eager", {})
        if mine:
            memory = [_figure(row, "peak_memory_bytes", 2**-20, ".1f") for row in (mine, eager)]
            launches = [mine.get("launches", "–"), mine.get("predicted_launches", "–"), eager.get("launches", "–")]
            rates = [_figure(mine, "tflops"), _figure(mine, "bytes_per_s", 1e-9, ".0f")]
            lines.append([case, *rates, *memory, *map(str, launches)])
    return _markdown(heads, lines)


def means(rows: list[Row]) -> str:
    """Geometric means of eager's time over fastlora's, by direction, mode and dtype."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        if row["contender"] == "fastlora" and "over_eager" in row:
            what = row["dtype"] + _variant(row)
            found.setdefault((row["direction"], row["mode"], what), []).append(1 / row["over_eager"]["median"])
    return _markdown(
        ["direction", "calls", "dtype", "cases", "eager ÷ fastlora, geometric mean", "worst"],
        [[*key, str(len(gains)), f"{statistics.geometric_mean(gains):.2f}", f"{min(gains):.2f}"]
         for key, gains in found.items()],
    )  # fmt: skip


def losses(rows: list[Row]) -> list[tuple[Row, str, float]]:
    """Where fastlora is slower than a rival in the same mode: (fastlora's row, who is fastest, our time over his)."""
    found = []
    for _, _, groups in _sections(rows):
        for group in groups.values():
            rivals = {name: row["median"] for name, row in group.items() if name in RIVALS}
            if "fastlora" in group and rivals:
                best = min(rivals, key=rivals.__getitem__)
                over = group["fastlora"]["median"] / rivals[best]
                if over > LEVEL:
                    found.append((group["fastlora"], best, over))
    return sorted(found, key=lambda one: -one[2])


def lost(rows: list[Row]) -> str:
    """The lost shapes as a Markdown list, or the statement that there are none."""
    found = losses(rows)
    if not found:
        return f"No measured shape at which a rival is more than {LEVEL - 1:.0%} faster."
    lines = [f"- {row['case']}, {row['direction']}, {row['mode']}: {best} is {over:.2f}× faster"
             for row, best, over in found]  # fmt: skip
    return "\n".join([f"Shapes at which a rival is more than {LEVEL - 1:.0%} faster:", "", *lines])


def training(payload: dict, path: Path) -> str:
    """A small Llama's training steps by stock PEFT and by the same patched, as Markdown."""
    heads = ["a small Llama trained with", "PEFT, ms", "fastlora, ms", "PEFT ÷ fastlora", "20–80 %", "losses apart"]
    heads += ["PEFT's from float32's", "calls by PEFT's own forward"]
    lines = []
    for case in payload["cases"]:
        times = [f"{case[name]['median'] * 1e3:.0f}" for name in ("peft", "fastlora")]
        gain, distances = case["peft_over_fastlora"], [f"{case[n]:.1g}" for n in ("apart", "stock_from_float32")]
        calls = f"{case['fallback_calls']} of {case['fallback_calls'] + case['fused_calls']}"
        spread = "{p20:.2f}–{p80:.2f}".format(**gain)
        lines.append([case["case"], *times, f"**{gain['median']:.2f}**", spread, *distances, calls])
    sizes = ", ".join(f"{name} {payload['arguments'][name]}" for name in ("hidden", "layers", "tokens", "dtype"))
    return f"{_markdown(heads, lines)}\n\n{sizes}; {provenance(payload, path)}"


def write_readme(path: Path, loaded: list[tuple[Path, dict]]) -> None:
    """Put each device's training steps, means and lost shapes between the two markers of the file `path`.

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
    parts = []
    for file, payload in loaded:
        parts += [f"### {payload['metadata']['device_name']}", provenance(payload, file)]
        figure = file.resolve().with_suffix(".png")
        if figure.exists() and figure.is_relative_to(path.resolve().parent):
            parts.append(f"![roofline, overhead and speed-up]({figure.relative_to(path.resolve().parent).as_posix()})")
        for mode, how in ((PLAIN, ""), (GRAPH, ", replayed by a CUDA graph")):
            groups = grouped(payload["rows"], TRAIN, mode)
            shown = {case: group for case, group in groups.items() if group["bare"]["dtype"] != "float16"}
            for kind, some in kinds(shown).items():
                what = f"Forward and backward{kind}{how}, times over the bare frozen linear; less is better:"
                parts.append(f"{what}\n\n{table(some)}")
        parts += [means(payload["rows"]), lost(payload["rows"])]
        parts += [training(load(one, "llama-step"), one) for one in sorted(file.parent.glob("*-llama-step.json"))[-1:]]
    path.write_text("\n\n".join([head + BEGIN, *parts, END + tail]), encoding="utf-8")


def compare(before: list[Row], after: list[Row]) -> tuple[str, int]:
    """A line for each row that both have, the slowest first, and how many of ours are slower past the noise.

    Each time is taken over the bare linear of its own job, which cancels the machine's drift; the noise is the range
    between the 20th and 80th percentiles of the two.

    Raises:
        UserError: they have no row in common.
    """

    def key(row):
        return f"{row['case']}/{row['direction']} {row['contender']} {row['mode']}"

    old = {key(row): row for row in before if "over_bare" in row}
    found, slower = [], 0
    for new in after:
        past = old.get(key(new))
        if past is None or "over_bare" not in new or new["contender"] == "bare":
            continue
        a, b = past["over_bare"], new["over_bare"]
        ratio, low, high = b["median"] / a["median"], b["p20"] / a["p80"], b["p80"] / a["p20"]
        worse = getattr(CONTENDERS.get(new["contender"]), "ours", False) and low > 1.0 and ratio > LEVEL
        slower += worse
        times = f"{past['median'] * 1e6:8.1f}us {new['median'] * 1e6:8.1f}us"
        found.append((ratio, f"{key(new):<84} {times}  {ratio:.3f} ({low:.3f}-{high:.3f})" + "  REGRESSION" * worse))
    if not found:
        raise UserError("the two have no row in common")
    head = f"{'job, contender':<84} {'before':>10} {'after':>10}  ratio over bare (20-80 %)"
    lines = [line for _, line in sorted(found, reverse=True)]
    return "\n".join([head, *lines, f"{len(found)} rows compared, {slower} slower past the noise"]), slower


def _sections(rows: list[Row]) -> Iterator[tuple[str, str, dict[str, Group]]]:
    for direction, mode in product((TRAIN, FORWARD), (PLAIN, COMPILED, GRAPH)):
        groups = grouped(rows, direction, mode)
        if groups:
            yield direction, mode, groups


def _variant(row: Row) -> str:
    base, dora = row.get("base"), row.get("dora")  # which older files lack
    several = [f", {row[many]} {many}" for many in ("adapters", "projections") if row.get(many, 1) > 1]
    return (f", {base}" if base else "") + (", DoRA" if dora else "") + "".join(several)


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(heads) - 1)
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def _in_tree(path: Path) -> str:
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _over(row: Row | None) -> str:
    return f"{row['over_bare']['median']:.2f}" if row and "over_bare" in row else "–"


def _figure(row: Row, key: str, factor: float = 1.0, form: str = ".2f") -> str:
    return format(row[key] * factor, form) if key in row else "–"
