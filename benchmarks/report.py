"""The tables of the README from the recorded runs: ``python -m benchmarks.report [--write]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.cases import OUR_STEP, OURS, REFERENCE_STEP
from benchmarks.growth_curves import curves, draw, exponent
from benchmarks.phases import PHASES, draw_phases
from benchmarks.record import RESULTS, load

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
COMMAND = "pytest benchmarks --record"
TITLES = {  # in this order
    "step": "Whole steps",
    "growth": "How a step grows",
    "rollout": "Rollouts",
    "training": "Training passes",
    "kernels": "Kernels",
    "video": "Frames to patches, decoding",
}
NOTHING = f"No results from a card have been recorded yet; `{COMMAND}` on a machine with one records them."
COLUMNS = (
    "implementation", "ms", "TF/s", "GB/s", "% of ceiling", "peak MiB", "rms error", "gradient error", "computes",
)  # fmt: skip


STEP_COLUMNS = (
    "implementation", "tokens", "TFLOP", "s (calls)", "s / ours", "CPU s", "CPU s / ours", "peak MiB", "MiB / ours",
    "TF/s", "% of ceiling", "rms error", "gradient error", "computes",
)  # fmt: skip
WHOLE_COLUMNS = (
    "implementation", "s a step", "prompts / hour", "s / ours", "CPU s", "CPU s / ours", "% of the limit", "peak MiB",
    "MiB / ours",
    *PHASES, "computes",
)  # fmt: skip
ROLLOUT_COLUMNS = (
    "implementation", "tokens", "s (calls)", "CPU s", "tokens/s", "x generate's tokens/s", "decode steps",
    "ms / decode step", "ms to read the weights", "ms / these", "peak MiB", "rms error", "computes",
)  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    """One run as Markdown: its machine, then a table with a heading row per case."""
    if record["part"] == "growth":
        return "\n".join([_machine(record), "", *_growth(record)])
    columns, cells = {
        "training": (STEP_COLUMNS, _step_cells),
        "step": (WHOLE_COLUMNS, _whole_cells),
        "rollout": (ROLLOUT_COLUMNS, _rollout_cells),
    }.get(record["part"], (COLUMNS, _cells))
    lines = [_machine(record), "", _row(columns), _row(["---", *["---:"] * (len(columns) - 2), "---"])]
    rows = sorted(record["rows"], key=_case_order(record["rows"]))
    for (op, title, _), group in groupby(rows, key=_case):
        entries = list(group)
        size = ", ".join(f"{key} {value}" for key, value in entries[0]["size"].items())
        count = next((entry["count"] for entry in entries if entry["count"]), "")
        counted = f"; {count} counted" if count else ""
        lines.append(_row([f"**{op}**, {title}: {size}{counted}", *[""] * (len(columns) - 1)]))
        lines += [_row(cells(entry, entries)) for entry in entries]
    return "\n".join(lines)


def report(folder: Path) -> str:
    """All recorded runs, cards before CPUs; a sentence that says how to record where there are none of a card."""
    records = sorted(map(load, folder.glob("*.json")), key=_place)
    blocks = [_folded(record) for record in records]
    if not any(record["cuda"] for record in records):
        blocks.insert(0, NOTHING)
    return "\n\n".join(blocks)


def write(text: str, readme: Path) -> None:
    """Replace what stands between the markers."""
    old = readme.read_text()
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme.name}: expected a line {BEGIN} and after it a line {END}, to put the table between")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def draw_all(folder: Path, pictures: Path) -> list[Path]:
    """The pictures of the recorded runs: ``<run>.png`` for each that has curves or phases to show."""
    drawn = []
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        painter = {"growth": draw, "step": draw_phases}.get(record["part"])
        if painter is not None and record["tests"] != "failed":
            pictures.mkdir(exist_ok=True)
            painter(record, pictures / f"{path.stem}.png")
            drawn.append(pictures / f"{path.stem}.png")
    return drawn


def _place(record: Mapping[str, Any]) -> tuple[bool, str, int]:
    """Cards before CPUs, one after the other, each part by part; a CPU is one, on however many threads it ran."""
    on_cpu = record["cuda"] is None
    return on_cpu, "" if on_cpu else record["card"], list(TITLES).index(record["part"])


def _folded(record: Mapping[str, Any]) -> str:
    """Behind a line to click: the tables are wide and long."""
    line = f"<summary>{TITLES[record['part']]}: {record['card']}, {record['date']}</summary>"
    return f"<details>\n{line}\n\n{_trusted(record)}\n\n</details>"


def _trusted(record: Mapping[str, Any]) -> str:
    if record["tests"] == "failed":
        return f"{_machine(record)}: the kernels' tests failed in this run, so its figures are left out."
    return table(record)


def _machine(record: Mapping[str, Any]) -> str:
    commit = record["commit"][:12] if record["commit"] else "unknown"
    state = " with local changes" if record["dirty"] else ""
    parts = [
        f"**{record['card']}**",
        f"driver {record['driver']}" if record["driver"] else "",
        f"CUDA {record['cuda']}" if record["cuda"] else "",
        f"Python {record['python']}",
        f"torch {record['torch']}",
        *(f"{name} {version}" for name, version in record["packages"].items() if version),
        f"commit {commit}{state}",
        record["date"],
        f"kernel tests {record['tests']}",
        "" if record["complete"] else "part of the cases only",
    ]
    ceiling = record["ceilings"]
    measured = (
        f"Ceilings of this run: {ceiling['gemm_tflops']:.4g} TF/s ({ceiling['gemm_dtype']} product "
        f"{ceiling['gemm_shape']}), {ceiling['copy_gbps']:.4g} GB/s (copy of {ceiling['copy_mib']} MiB, read + write)."
    )
    return f"{', '.join(part for part in parts if part)}. {measured}"


def _cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> list[str]:
    if row["seconds"] is None:
        return [row["implementation"], f"{row['status']}: {row['reason']}", *[""] * 7]
    graph = ", graph" if row["timing"] == "graph" else ""
    return [
        _name(row),
        f"{row['seconds'] * 1e3:.4g}{graph}",
        _number(row["tflops"]),
        _number(row["gbps"]),
        f"{row['percent']:.1f} ({row['ceiling']})",
        f"{row['peak_mib']:.1f}",
        *_errors(row),
        row["does"],
    ]


def _step_cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> list[str]:
    """Time and memory also as multiples of ours."""
    if row["seconds"] is None:
        return [row["implementation"], f"{row['status']}: {row['reason']}", *[""] * (len(STEP_COLUMNS) - 2)]
    ours = next(entry for entry in case if entry["implementation"].startswith(OURS))

    def ratio(field: str) -> str:
        return f"{row[field] / ours[field]:.2f}" if row[field] and ours[field] else ""

    return [
        _name(row),
        str(row["tokens"]),
        f"{row['flops'] / 1e12:.4g}",
        f"{row['seconds']:.4g} ({row['rounds']})",
        ratio("seconds"),
        _number(row["cpu_seconds"]),
        ratio("cpu_seconds"),
        f"{row['peak_mib']:.0f}",
        ratio("peak_mib"),
        _number(row["tflops"]),
        f"{row['percent']:.1f}",
        *_errors(row),
        row["does"],
    ]


def _whole_cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> list[str]:
    """A phase: its milliseconds, and behind the bar its peak of memory in MiB; both memories beyond what is held."""
    if row["seconds"] is None:
        return [row["implementation"], f"{row['status']}: {row['reason']}", *[""] * (len(WHOLE_COLUMNS) - 2)]
    ours = next(entry for entry in case if entry["implementation"].startswith(OURS))

    def ratio(field: str) -> str:
        return f"{row[field] / ours[field]:.2f}" if row[field] and ours[field] else ""

    def phase(name: str) -> str:
        found = row["phases"].get(name, {})
        if "seconds" not in found:
            return ""
        floor = f", at least {1e3 * found['floor_seconds']:.3g}" if row is ours and "floor_seconds" in found else ""
        return f"{1e3 * found['seconds']:.3g} ms{floor}; {found.get('peak_mib', 0):.0f}"

    return [
        _name(row),
        f"{row['seconds']:.4g} ({row['rounds']})",
        f"{row['prompts_per_hour']:.0f}",
        ratio("seconds"),
        _number(row["cpu_seconds"]),
        ratio("cpu_seconds"),
        f"{row['percent']:.1f}" if row["percent"] else "",
        f"{row['peak_mib']:.0f} + {row['held_mib']:.0f}",
        ratio("peak_mib"),
        *[phase(name) for name in PHASES],
        row["does"],
    ]


def _growth(record: Mapping[str, Any]) -> list[str]:
    """Seconds by size, axis by axis, each with the exponents of its curves."""
    base = record["rows"][0]["size"] if record["rows"] else {}
    fixed = ", ".join(f"{key} {value}" for key, value in base.items() if key in ("model", "trained", "dtype"))
    seconds, memory = curves(record["rows"]), curves(record["rows"], "peak_mib")
    header = ["what grows", "size", "ours, s", "reference code, s", "reference / ours"]
    header += ["ours, MiB", "reference code, MiB"] if memory else []
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for axis, ways in seconds.items():
        ours, others = (ways.get(name, {}) for name in (OUR_STEP, REFERENCE_STEP))
        peaks = [memory.get(axis, {}).get(name, {}) for name in (OUR_STEP, REFERENCE_STEP)] if memory else []
        for size in sorted({*ours, *others}):
            ratio = f"{others[size] / ours[size]:.2f}" if size in ours and size in others else ""
            cells = [axis, str(size), _number(ours.get(size)), _number(others.get(size)), ratio]
            lines.append(_row([*cells, *[_number(peak.get(size)) for peak in peaks]]))
        exponents = [f"{exponent(points):.2f}" for points in (ours, others)]
        lines.append(_row([f"{axis}: exponent", "", *exponents, "", *[f"{exponent(peak):.2f}" for peak in peaks]]))
    notes = [
        f"Not measured: {row['title']} {row['size']}: {row['implementation']}: {row['reason']}"
        for row in record["rows"] if row["seconds"] is None
    ]  # fmt: skip
    return [f"Growth of a step ({fixed}):", "", *lines, *([""] if notes else []), *notes]


def _rollout_cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> list[str]:
    """Time per sampled token and, behind the prefill, per decode step; the floor of the latter is in ``percent``."""
    if row["seconds"] is None:
        return [row["implementation"], f"{row['status']}: {row['reason']}", *[""] * (len(ROLLOUT_COLUMNS) - 2)]
    other = next(entry for entry in case if not entry["implementation"].startswith(OURS))
    step = row["decode_seconds"] / row["decode_steps"] * 1e3 if row["decode_steps"] else None
    floor = row["percent"] / 100 if row["percent"] else None
    return [
        _name(row),
        str(row["tokens"]),
        f"{row['seconds']:.4g} ({row['rounds']})",
        _number(row["cpu_seconds"]),
        f"{row['tokens'] / row['seconds']:.0f}",
        f"{other['seconds'] / row['seconds']:.2f}" if other["seconds"] else "",
        str(row["decode_steps"]),
        "" if step is None else f"{step:.3g}",
        f"{step * floor:.3g}" if step and floor else "",
        f"{1 / floor:.2f}" if floor else "",
        f"{row['peak_mib']:.1f}",
        _errors(row)[0],
        row["does"],
    ]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['implementation']} ({row['backend']})" if row["backend"] else row["implementation"]


def _errors(row: Mapping[str, Any]) -> list[str]:
    """The largest error of values, and of gradients."""
    gradients = [error for name, error in row["errors"].items() if name.startswith("d_")]
    values = [error for name, error in row["errors"].items() if not name.startswith("d_")]
    return [f"{max(errors):.1e}" if errors else "" for errors in (values, gradients)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _case(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["title"], str(row["size"])


def _case_order(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows of a case together, in the order in which the cases first came."""
    first: dict[tuple[str, str, str], int] = {}
    for row in rows:
        first.setdefault(_case(row), len(first))
    return lambda row: first[_case(row)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put it between {BEGIN} and {END} of README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded runs")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    text = report(options.results)
    if options.write:
        write(text, options.readme)
        draw_all(options.results, options.readme.parent / "docs")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
