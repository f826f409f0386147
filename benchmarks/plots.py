"""One figure of a result file: the roofline, overhead against M, and speed-up over eager."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import PLAIN, TRAIN
from benchmarks.report import grouped

COLOURS = {"bare": "#888888", "eager": "#d1495b", "peft": "#edae49", "optimised": "#66a182", "fastlora": "#00798c",
           "lorafusion": "#8d6a9f"}  # fmt: skip


def draw(payload: dict, path: Path) -> Path | None:
    """Write the figure to `path`; None where matplotlib is missing or nothing was measured."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(payload["rows"], TRAIN, PLAIN)
    if not groups:
        return None
    figure, (roofline, overhead, speedup) = pyplot.subplots(1, 3, figsize=(19, max(5.5, 0.17 * len(groups))))
    _roofline(roofline, groups, payload.get("ceilings"))
    _overhead(overhead, groups)
    _speedup(speedup, groups)
    data = payload["metadata"]
    figure.suptitle(
        f"{data['device_name']}, torch {data['versions'].get('torch')}, forward+backward, {data['date'][:10]}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _roofline(axes, groups: dict, ceilings: dict | None) -> None:
    """TFLOP/s against operations per byte that the traffic model counts."""
    for name in ("bare", "eager", "fastlora"):
        rows = [group[name] for group in groups.values() if name in group]
        intensity = [row["tflops"] * 1e12 / row["bytes_per_s"] for row in rows]
        axes.scatter(intensity, [row["tflops"] for row in rows], s=16, label=name, color=COLOURS[name], zorder=3)
    if ceilings:
        slope = ceilings["bytes_per_s"] / 1e12
        low = min(axes.get_xlim()[0], 1.0) if axes.get_xlim()[0] > 0 else 1.0
        used = {group["bare"]["dtype"] for group in groups.values()}
        for dtype in sorted(used):
            top = ceilings["flops_per_s"][dtype] / 1e12
            knee = top / slope
            axes.plot(
                [low, knee, max(axes.get_xlim()[1], 4 * knee)],
                [low * slope, top, top],
                linewidth=1,
                label=f"measured ceiling, {dtype}",
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="TFLOP/s", title="Roofline")
    axes.legend(fontsize=7)


def _overhead(axes, groups: dict) -> None:
    """Time over the bare linear, less one, against M: a line for each contender, the median over cases of that M."""
    for name in ("eager", "peft", "optimised", "lorafusion", "fastlora"):
        by_m: dict[int, list[float]] = {}
        for group in groups.values():
            if name in group and "over_bare" in group[name]:
                by_m.setdefault(group[name]["M"], []).append(100 * (group[name]["over_bare"]["median"] - 1))
        if by_m:
            rows = sorted(by_m)
            axes.plot(rows, [_median(by_m[m]) for m in rows], marker="o", markersize=4, label=name, color=COLOURS[name])
            axes.scatter(
                [m for m in rows for _ in by_m[m]],
                [v for m in rows for v in by_m[m]],
                s=5,
                color=COLOURS[name],
                alpha=0.4,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="symlog",
        xlabel="tokens M",
        ylabel="overhead over the bare linear, %",
        title="Overhead against M",
    )
    axes.legend(fontsize=7)


def _speedup(axes, groups: dict) -> None:
    """How many times faster than eager, by case, the worst first; below one is a loss."""
    gains = sorted((1 / group["fastlora"]["over_eager"]["median"], case) for case, group in groups.items()
                   if "over_eager" in group.get("fastlora", {}))  # fmt: skip
    colours = [COLOURS["fastlora"] if gain >= 1 else COLOURS["eager"] for gain, _ in gains]
    axes.barh([case for _, case in gains], [gain for gain, _ in gains], color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="eager ÷ fastlora", title="Speed-up over eager")


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
