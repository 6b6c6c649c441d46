"""How the seconds of a step grow with one of its sizes: curves out of a record's rows, their exponents, a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import OUR_STEP

NAMES = {"frames": "frames", "completion": "C", "generations": "G", "prompts": "prompts"}  # in a row's size


def exponent(points: Mapping[int, float]) -> float:
    """The least squares fit of b in seconds = a * size ** b; NaN below two points."""
    if len(points) < 2:
        return float("nan")
    sizes, seconds = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(sizes, seconds, 1)[0])


def curves(rows: Sequence[Mapping[str, Any]], field: str = "seconds") -> dict[str, dict[str, dict[int, float]]]:
    """Seconds (or another field) by axis, implementation and size, of what was measured."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row[field] is not None:
            size = int(re.match(r"\d+", str(row["size"][NAMES[row["title"]]]))[0])  # type: ignore[index]
            found.setdefault(row["title"], {}).setdefault(row["implementation"], {})[size] = row[field]
    return found


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The table as a picture: both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    found = curves(record["rows"])
    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.6), layout="constrained", squeeze=False)
    for plot, (axis, ways) in zip(axes.flat, found.items(), strict=True):
        for (way, points), color in zip(ways.items(), ("tab:blue", "tab:orange"), strict=False):
            label = f"{'videor1' if way == OUR_STEP else way}, exponent {exponent(points):.2f}"
            plot.loglog(list(points), list(points.values()), "o-", color=color, label=label)
        sizes = sorted({size for points in ways.values() for size in points})
        plot.set_xticks(sizes, [str(size) for size in sizes])
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plot.minorticks_off()
        plot.set_title(f"Seconds a step by {axis}", loc="left", fontsize=10)
        plot.grid(alpha=0.2)
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
