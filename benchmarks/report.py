"""The page of results and the README's table from the recorded runs: ``python -m benchmarks.report [--write]``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.cases import OUR_STEP, OURS, REFERENCE_STEP
from benchmarks.growth_curves import curves, draw, exponent
from benchmarks.phases import PHASES, draw_phases
from benchmarks.record import RESULTS, load

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks" / "results.md"
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
PAINTERS = {"growth": draw, "step": draw_phases}
NOTHING = f"No results from a card have been recorded yet; `{COMMAND}` on a machine with one records them."
NOT_ON_A_GPU = "Nothing has been measured on a GPU yet."
HEAD = """\
# Results

<!-- Made by python -m benchmarks.report --write from benchmarks/results/*.json. -->

[Method](method.md) says how these were measured and what the columns mean.

"""
COLUMNS = (
    "implementation",
    "ms",
    "TF/s",
    "GB/s",
    "% of ceiling",
    "peak MiB",
    "rms error",
    "gradient error",
    "computes",
)
SUMMARY_COLUMNS = (
    "Prompts per hour, whole steps",
    "Machine",
    "videor1",
    REFERENCE_STEP,
    "TRL",
    "times faster",
    "times less memory",
)
STEP_COLUMNS = (
    "implementation",
    "tokens",
    "TFLOP",
    "s (calls)",
    "s / ours",
    "CPU s",
    "CPU s / ours",
    "peak MiB",
    "MiB / ours",
    "TF/s",
    "% of ceiling",
    "rms error",
    "gradient error",
    "computes",
)
WHOLE_COLUMNS = (
    "implementation",
    "s a step",
    "prompts / hour",
    "s / ours",
    "CPU s",
    "CPU s / ours",
    "% of the limit",
    "peak MiB",
    "MiB / ours",
    *PHASES,
    "computes",
)
ROLLOUT_COLUMNS = (
    "implementation",
    "tokens",
    "s (calls)",
    "CPU s",
    "tokens/s",
    "x generate's tokens/s",
    "decode steps",
    "ms / decode step",
    "ms to read the weights",
    "ms / these",
    "peak MiB",
    "rms error",
    "computes",
)


def table(record: Mapping[str, Any]) -> str:
    """One run as Markdown: its machine, then a table per case."""
    if record["part"] == "growth":
        return "\n".join([_machine(record), "", *_growth(record)])
    columns, cells = {
        "training": (STEP_COLUMNS, _step_cells),
        "step": (WHOLE_COLUMNS, _whole_cells),
        "rollout": (ROLLOUT_COLUMNS, _rollout_cells),
    }.get(record["part"], (COLUMNS, _cells))
    lines = [_machine(record)]
    rows = sorted(record["rows"], key=_case_order(record["rows"]))
    for (op, title, _), group in groupby(rows, key=_case):
        entries = list(group)
        size = ", ".join(f"{key} {value}" for key, value in entries[0]["size"].items())
        count = next((entry["count"] for entry in entries if entry["count"]), "")
        counted = f"; {count} counted" if count else ""
        lines += ["", f"**{op}**, {title}: {size}{counted}", ""]
        lines += [_row(columns), _row(["---", *["---:"] * (len(columns) - 2), "---"])]
        for entry in entries:
            not_run = [entry["implementation"], f"{entry['status']}: {entry['reason']}", *[""] * (len(columns) - 2)]
            lines.append(_row(not_run if entry["seconds"] is None else cells(entry, entries)))
    return "\n".join(lines)


def report(folder: Path) -> str:
    """All recorded runs, cards before CPUs; a sentence that says how to record where there are none of a card."""
    return "\n\n".join(_sections(folder, with_pictures=False))


def page(folder: Path) -> str:
    """The page of results, with its pictures."""
    return HEAD + "\n\n".join(_sections(folder, with_pictures=True)) + "\n"


def summary(folder: Path) -> str:
    """The README's table: prompts per hour of whole steps, and the sentence that none is of a GPU where that is so."""
    records = [record for _, record in _records(folder) if record["part"] == "step" and record["tests"] != "failed"]
    lines = [_row(SUMMARY_COLUMNS), _row(["---", "---", *["--:"] * 5])]
    for record in records:
        for _, group in groupby(sorted(record["rows"], key=_case_order(record["rows"])), key=_case):
            lines.append(_row(_summary_cells(record, {row["implementation"]: row for row in group})))
    versions = [
        f"{record['card']}: torch {record['torch']}, commit {_commit(record)}, {record['date']}." for record in records
    ]
    gpu = [] if any(record["cuda"] for record in records) else [NOT_ON_A_GPU]
    return "\n".join([*lines, "", " ".join([*versions, *gpu])])


def _summary_cells(record: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ours, theirs = (rows.get(name, {}) for name in (OUR_STEP, REFERENCE_STEP))
    size = next(iter(rows.values()))["size"]
    media = "images" if size.get("media") == "image" else f"videos of {size['frames']} frames"
    model = "the demonstration's model" if size["model"] == "tiny" else f"{size['model']} shapes"
    prompts, answers = "prompt" if size["prompts"] == 1 else "prompts", size["G"].removesuffix(" + 0")

    def rate(row: Mapping[str, Any]) -> str:
        return f"{row['prompts_per_hour']:,.0f}" if row.get("prompts_per_hour") else ""

    def times(above: Any, below: Any) -> str:
        return f"{above / below:.1f}" if above and below else ""

    return [
        f"{model}, {size['prompts']} {prompts} with {media}, {answers} answers of {size['C']} tokens",
        record["card"],
        rate(ours),
        rate(theirs),
        next((rate(row) for name, row in rows.items() if name.startswith("TRL")), ""),
        times(theirs.get("seconds"), ours.get("seconds")),
        times(theirs.get("peak_mib"), ours.get("peak_mib")),
    ]


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
    for stem, record in _records(folder):
        if _has_picture(record):
            pictures.mkdir(exist_ok=True)
            PAINTERS[record["part"]](record, pictures / f"{stem}.png")
            drawn.append(pictures / f"{stem}.png")
    return drawn


def _place(record: Mapping[str, Any]) -> tuple[bool, str, int]:
    """Cards before CPUs, one after the other, each part by part; a CPU is one, on however many threads it ran."""
    on_cpu = record["cuda"] is None
    return on_cpu, "" if on_cpu else record["card"], list(TITLES).index(record["part"])


def _records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name of the file, record) of each run, in the order of the page."""
    found = [(path.stem, load(path)) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda named: _place(named[1]))


def _sections(folder: Path, *, with_pictures: bool) -> list[str]:
    records, blocks = _records(folder), []
    if not any(record["cuda"] for _, record in records):
        blocks.append(NOTHING)
    for stem, record in records:
        title = f"{TITLES[record['part']]}: {record['card']}, {record['date']}"
        picture = f"![{title}]({stem}.png)\n\n" if with_pictures and _has_picture(record) else ""
        blocks.append(f"## {title}\n\n{picture}{_trusted(record)}")
    return blocks


def _has_picture(record: Mapping[str, Any]) -> bool:
    return record["part"] in PAINTERS and record["tests"] != "failed"


def _trusted(record: Mapping[str, Any]) -> str:
    if record["tests"] == "failed":
        return f"{_machine(record)}: the kernels' tests failed in this run, so its figures are left out."
    return table(record)


def _machine(record: Mapping[str, Any]) -> str:
    parts = [
        f"**{record['card']}**",
        f"driver {record['driver']}" if record["driver"] else "",
        f"CUDA {record['cuda']}" if record["cuda"] else "",
        f"Python {record['python']}",
        f"torch {record['torch']}",
        *(f"{name} {version}" for name, version in record["packages"].items() if version),
        f"commit {_commit(record)}",
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


def _commit(record: Mapping[str, Any]) -> str:
    commit = record["commit"][:12] if record["commit"] else "unknown"
    return f"{commit} with local changes" if record["dirty"] else commit


def _cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> list[str]:
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
    ratio = functools.partial(_times_ours, row, case)
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
    ratio, ours = functools.partial(_times_ours, row, case), _ours(case)

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
        for row in record["rows"]
        if row["seconds"] is None
    ]
    return [f"Growth of a step ({fixed}):", "", *lines, *([""] if notes else []), *notes]


def _rollout_cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> list[str]:
    """Time per sampled token and, behind the prefill, per decode step; the floor of the latter is in ``percent``."""
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


def _ours(case: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(entry for entry in case if entry["implementation"].startswith(OURS))


def _times_ours(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]], field: str) -> str:
    ours = _ours(case)
    return f"{row[field] / ours[field]:.2f}" if row[field] and ours[field] else ""


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
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write the page and its pictures, and the table between {BEGIN} and {END} of the README",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="page of results; the pictures stand beside it")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    if options.write:
        write(summary(options.results), options.readme)
        options.page.write_text(page(options.results))
        draw_all(options.results, options.page.parent)
    else:
        print(report(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
