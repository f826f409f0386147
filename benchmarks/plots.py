"""One figure of a result file: the roofline, overhead against M, and speed-up over eager."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.cases import PLAIN, TRAIN
from benchmarks.contenders import CONTENDERS, RIVALS
from benchmarks.report import Group, grouped, kinds

COLOURS = {"bare": "#888888", **{name: CONTENDERS[name].colour for name in RIVALS}, "fastlora": "#00798c"}


def draw(payload: dict, path: Path) -> Path | None:
    """The figure: roofline, overhead against M, speed-up over eager. None without matplotlib or without a figure."""
    groups = kinds(grouped(payload["rows"], TRAIN, PLAIN)).get("", {})
    try:
        import matplotlib
    except ImportError:
        return None
    if not groups:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, max(7.0, 0.2 * len(groups))), layout="constrained")
    places = figure.subplot_mosaic([["speedup", "overhead"], ["speedup", "roofline"]])
    roofline, overhead, speedup = (places[name] for name in ("roofline", "overhead", "speedup"))
    _draw_roofline(roofline, groups, payload["ceilings"])
    for name in ("eager", *RIVALS[1:], "fastlora"):
        points = [(group[name]["M"], 100 * (group[name]["over_bare"]["median"] - 1))
                  for group in groups.values() if name in group]  # fmt: skip
        rows = sorted({M for M, _ in points})
        middle = [statistics.median(percent for M, percent in points if row == M) for row in rows]
        overhead.plot(rows, middle, marker="o", markersize=4, label=name, color=COLOURS[name])
        overhead.scatter(*zip(*points, strict=True) if points else ([], []), s=5, color=COLOURS[name], alpha=0.4)
    overhead.axhline(0, color="black", linewidth=0.8)
    overhead.set(xscale="log", yscale="symlog", xlabel="tokens M", ylabel="overhead over the bare linear, %")
    gains = sorted((1 / group["fastlora"]["over_eager"]["median"], case) for case, group in groups.items()
                   if "over_eager" in group.get("fastlora", {}))  # fmt: skip
    colours = [COLOURS["fastlora" if gain >= 1 else "eager"] for gain, _ in gains]
    speedup.barh([case.removeprefix("classifier-") for _, case in gains], [gain for gain, _ in gains], color=colours)
    speedup.axvline(1, color="black", linewidth=0.8)
    speedup.tick_params(axis="y", labelsize=8)
    speedup.margins(y=0.01)
    speedup.set(xlabel="eager ÷ fastlora, M×K×N", title="Speed-up over eager")
    for axes in (roofline, overhead):
        axes.legend(fontsize=7)
    data = payload["metadata"]
    figure.suptitle(f"{data['device_name']}, torch {data['versions'].get('torch')}, {TRAIN}, {data['date'][:10]}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _draw_roofline(axes, groups: dict[str, Group], ceilings: dict) -> None:
    """TFLOP/s against operations per byte that the traffic model counts, below the measured ceilings."""
    for name in ("bare", "eager", "fastlora"):
        rows = [group[name] for group in groups.values() if "bytes_per_s" in group.get(name, {})]
        intensity = [row["tflops"] * 1e12 / row["bytes_per_s"] for row in rows]
        axes.scatter(intensity, [row["tflops"] for row in rows], s=16, label=name, color=COLOURS[name], zorder=3)
    slope, right = ceilings["bytes_per_s"] / 1e12, axes.get_xlim()[1]
    for dtype in sorted({group["bare"]["dtype"] for group in groups.values()}):
        top = ceilings["flops_per_s"][dtype] / 1e12
        knee = top / slope
        corners = [1.0, knee, max(right, 4 * knee)], [slope, top, top]
        axes.plot(*corners, linewidth=1, label=f"measured ceiling, {dtype}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="TFLOP/s", title="Roofline")
