"""Draw the charts of the report as plotly figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from videor1.report.cards import visible
from videor1.report.derived import PHASES
from videor1.report.metrics import Series, combine
from videor1.report.panels import CHARTS, PHASE_LABELS, Chart
from videor1.report.run import Run

# Each color has a contrast of at least 3:1 against white and against the dark background.
COLORS = ("#3b7dd8", "#d9660a", "#0f9d76", "#9457eb", "#d6336c", "#0891b2", "#a16207", "#6b7280")
DASHES = ("solid", "dash", "dot")
DASH_NAMES = ("solid", "dashed", "dotted")
PATTERN = {"fillmode": "overlay", "fgcolor": "rgba(255,255,255,0.55)", "size": 7, "solidity": 0.25}
POINTS = 2000  # most points of a series


def charts(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw every chart that has values in at least one of the runs.

    Returns:
        ({id, title, note, summary, figure} of each of these charts, titles of the charts without values).
    """
    made, empty = [], []
    for chart in CHARTS:
        present = [run for run in runs if any(len(run.metrics[name]) for name, _ in chart.lines)]
        if present:
            note = chart.note
            if len(runs) > 1 and len(chart.lines) > 1:
                drawn = [any(len(run.metrics[name]) for run in runs) for name, _ in chart.lines]
                lines = zip(DASH_NAMES, chart.lines, drawn, strict=False)
                note += f" {', '.join(f'{dash}: {label}' for dash, (_, label), some in lines if some).capitalize()}."
            if len(present) < len(runs):
                note += " Not measured in " + ", ".join(visible(run.name) for run in runs if run not in present) + "."
            if chart.log and any(nonzero := [_positive(chart, run) for run in present]) and not all(nonzero):
                zero = [visible(run.name) for run, some in zip(present, nonzero, strict=True) if not some]
                note += f" All 0, and so not on this axis, in {', '.join(zero)}."
            summary = _summary(chart, present, len(runs) > 1)
            made.append(_entry(chart.id, chart.title, note.strip(), summary, _figure(chart, runs)))
        else:
            empty.append(chart.title)
    times = step_times(runs)
    if times is None:
        empty.append("Where the time goes")
    else:
        made.append(times)
    return made, empty


def points(runs: int) -> int:
    """Return the largest number of points of a series on a page with so many runs."""
    return max(200, min(POINTS, 8000 // runs))


def _entry(id: str, title: str, note: str, summary: str, figure: go.Figure) -> dict[str, Any]:
    return {"id": id, "title": title, "note": note, "summary": summary, "figure": figure.to_dict()}


def _summary(chart: Chart, runs: Sequence[Run], several: bool) -> str:
    """Describe a chart in words, by the first and last value of each line."""
    parts = []
    for run in runs:
        for name, label in chart.lines:
            if len(series := run.metrics[name].smoothed()):
                first, last = series.values[0], series.values[-1]
                where = f"{visible(run.name)}, " if several else ""
                parts.append(f"{where}{label}: {first:.4g} at step {series.steps[0]}, {last:.4g} at {series.steps[-1]}")
    return f"{chart.title}. " + "; ".join(parts)


def _figure(chart: Chart, runs: Sequence[Run]) -> go.Figure:
    """Draw a chart.

    With a single run, each line has a color of its own. With several runs, each run has a color and each line a dash
    style, and a click on a run's name in the legend hides all lines of the run.
    """
    figure, several, most = _empty_figure(chart.unit), len(runs) > 1, points(len(runs))
    for r, run in enumerate(runs):
        run_lines = chart.lines if several else ()
        # The first line with values represents the run in the legend.
        first = next((name for name, _ in run_lines if len(run.metrics[name])), None)
        if chart.gap:
            upper, lower = (run.metrics[name] for name, _ in chart.lines[:2])
            _shade(figure, upper, lower, COLORS[r % len(COLORS)], _escaped_name(run) if several else "", most)
        for i, (name, label) in enumerate(chart.lines):
            if len(run.metrics[name]):
                line = {"color": COLORS[(r if several else i) % len(COLORS)], "dash": DASHES[i % len(DASHES)]}
                names: dict[str, Any] = {"name": label, "legendgroup": label}
                if several:
                    run_name = _escaped_name(run)
                    full = f"{run_name}: {label}" if len(run_lines) > 1 else run_name
                    names = {"name": full, "legendgroup": run_name, "showlegend": name == first}
                _line(figure, run.metrics[name], line, names, most, chart.smooth)
    if several:  # The legend shows the names of the runs.
        figure.for_each_trace(lambda trace: trace.update(name=trace.legendgroup) if trace.showlegend else None)
    if chart.share:
        top = max((s.values.max() for run in runs for n, _ in chart.lines if len(s := run.metrics[n])), default=1.0)
        figure.update_yaxes(range=[-0.02, max(1.02, top)] if chart.gap or top > 0.5 else None, rangemode="tozero")
    if chart.log and any(_positive(chart, run) for run in runs):
        figure.update_yaxes(type="log", nticks=6)
    elif chart.log:
        figure.update_yaxes(rangemode="tozero")
    return figure


def _positive(chart: Chart, run: Run) -> bool:
    """Return whether the run has a positive value, which a logarithmic axis can show."""
    return any((run.metrics[name].values > 0).any() for name, _ in chart.lines)


def _escaped_name(run: Run) -> str:
    """Return the run's name with HTML escaped, because plotly interprets some tags."""
    return html.escape(visible(run.name))


def _line(
    figure: go.Figure, series: Series, line: dict[str, Any], names: dict[str, Any], most: int, smooth: bool
) -> None:
    """Draw a series: faint points under their moving average, or only the points if there are few."""
    averaged = smooth and series.smooths
    if averaged:
        raw = series.thinned(most)
        figure.add_scatter(
            x=_steps(raw),
            y=_values(raw),
            mode="lines",
            line={"color": line["color"], "width": 1},
            opacity=0.3,
            hoverinfo="skip",
            **names | {"showlegend": False},
        )
    shown = (series.smoothed() if averaged else series).spread(most)
    figure.add_scatter(
        x=_steps(shown),
        y=_values(shown),
        mode="lines" if series.smooths else "lines+markers",
        line={"width": 2.2, **line},
        marker={"size": 7},
        hovertemplate="%{y:.4g}",
        **names,
    )


def _shade(figure: go.Figure, upper: Series, lower: Series, color: str, run: str, most: int) -> None:
    """Shade the area between two lines where both are known."""
    steps, high, low = combine(upper.smoothed(), lower.smoothed())
    if len(steps) < 2:
        return
    style: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    style |= {"name": f"{run}: temporal gap" if run else "temporal gap", "legendgroup": run or "temporal gap"}
    bottom, top = Series(steps, low).spread(most), Series(steps, high).spread(most)
    fill = f"rgba({int(color[1:3], 16)},{int(color[3:5], 16)},{int(color[5:7], 16)},0.16)"
    figure.add_scatter(x=_steps(bottom), y=_values(bottom), showlegend=False, **style)
    figure.add_scatter(x=_steps(top), y=_values(top), fill="tonexty", fillcolor=fill, showlegend=not run, **style)


def step_times(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Draw the seconds of each phase of a step: stacked areas for one run, or a bar of medians for each of several.

    Returns:
        The chart as in :func:`charts`, or None if no run measured any phase.
    """
    phases = [phase for phase in (*PHASES, "other") if any(len(run.metrics[f"seconds/{phase}"]) for run in runs)]
    if not phases:
        return None
    medians = {
        (run.name, phase): float(sorted(values)[len(values) // 2])
        for run in runs
        for phase in phases
        if len(values := run.metrics[f"seconds/{phase}"].values)
    }
    note = "Smoothed, stacked." if len(runs) == 1 else "Medians over the steps."
    if "other" not in phases:
        note += " Only what these phases took was measured, not the whole step."
    figure = _empty_figure("seconds a step")
    for i, phase in enumerate(phases):
        name, color = PHASE_LABELS.get(phase, phase), COLORS[i % len(COLORS)]
        if len(runs) == 1:
            series = runs[0].metrics[f"seconds/{phase}"].smoothed().spread(points(1))
            figure.add_scatter(
                x=_steps(series),
                y=_values(series),
                name=name,
                stackgroup="step",
                mode="lines",
                line={"color": color, "width": 1},
                hovertemplate="%{y:.3g} s",
            )
        else:
            figure.add_bar(
                y=[_escaped_name(run) for run in runs],
                x=[medians.get((run.name, phase)) for run in runs],
                name=name,
                orientation="h",
                hovertemplate="%{x:.3g} s",
                marker={"color": color, "pattern": PATTERN | {"shape": ("", "/", ".", "x", "\\", "-")[i % 6]}},
            )
    if len(runs) > 1:
        figure.update_layout(barmode="stack", hovermode="closest")
        figure.update_xaxes(title_text="seconds a step")
        figure.update_yaxes(title_text="", automargin=True, autorange="reversed")
    words = "; ".join(
        f"{visible(name)}, {PHASE_LABELS.get(phase, phase)}: {value:.3g} s" for (name, phase), value in medians.items()
    )
    return _entry("times", "Where the time goes", note, f"Median seconds a step. {words}", figure)


def _steps(series: Series) -> Any:
    return series.steps.astype("int32")


def _values(series: Series) -> Any:
    return series.values.astype("float32")


def _empty_figure(unit: str) -> go.Figure:
    """Return a figure with the axes of a chart and no lines. The page's script sets the colors of text and axes."""
    return go.Figure(
        layout={
            "template": "none",
            "height": 300,
            "margin": {"l": 52, "r": 12, "t": 8, "b": 40},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hovermode": "x unified",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero", "zeroline": False},
            "yaxis": {"title": {"text": unit}, "zeroline": False, "automargin": True, "exponentformat": "e"},
        }
    )
