"""The README fits five minutes, its commands and its code run, and its numbers are those of their sources."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pages
import pytest

from benchmarks import report
from benchmarks.record import RESULTS
from videor1.plan.plan import CARDS, CONTEXT, SLACK, USABLE

README = pages.README.read_text(encoding="utf-8")
MEMORY = (pages.ROOT / "docs" / "training" / "memory.md").read_text(encoding="utf-8")
GIB = 2**30


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose heading begins with ``first``."""
    table = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], *table[2:])]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_benchmark_table_is_that_of_the_recorded_runs() -> None:
    text = README.partition(f"{report.BEGIN}\n")[2].partition(f"\n{report.END}")[0]
    assert text == report.summary(RESULTS), "not current: run python -m benchmarks.report --write"
    on_a_gpu = any(json.loads(path.read_text())["cuda"] for path in RESULTS.glob("*.json"))
    assert (report.NOT_ON_A_GPU in README) == (not on_a_gpu)


def test_what_fits_where_is_that_of_the_page() -> None:
    head, *long = rows(MEMORY, "Model")
    columns = [head.index(cell) for cell in ("Model", "Trained", "Needs", *(f"{card} GB" for card in CARDS))]
    short = rows(README, "Model")
    assert len(short) == 5
    for row in short:
        assert row in [[cells[i] for i in columns] for cells in (head, *long)]


def test_what_fits_where_follows_from_its_phases() -> None:
    """The phases themselves take minutes to plan; what is derived from them is checked here."""
    head, *table = rows(MEMORY, "Model")
    first, needs = head.index("Rollout"), head.index("Needs")
    for row in table:
        phases = [float(cell.strip("*")) for cell in row[first:needs]]
        bold = [float(cell.strip("*")) for cell in row[first:needs] if cell.startswith("**")]
        assert bold == [max(phases)]
        total = float(row[needs])
        assert total == pytest.approx(max(phases) * (1 + SLACK) + CONTEXT / GIB, abs=0.11)
        assert row[needs + 1 :] == ["yes" if total <= card * USABLE else "no" for card in CARDS]


def test_the_demonstration_is_told_alike() -> None:
    started = (pages.ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    (table,) = (block for block in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S) if "held-out" in block)
    assert table in started


def test_the_layers_are_told_alike() -> None:
    told = re.compile(r"^words \(types.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
    page = (pages.ROOT / "docs" / "develop" / "architecture.md").read_text(encoding="utf-8")
    (here,), (there,) = told.findall(README), told.findall(page)
    assert here.split() == there.split()


@pytest.mark.parametrize("page", [pages.README, pages.ROOT / "docs" / "index.md"], ids=pages.name)
def test_supported_versions_are_those_of_the_package(page: Path) -> None:
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    said = " ".join(page.read_text(encoding="utf-8").split())
    python = re.findall(r"Python (\d+\.\d+) to 3\.(\d+)", said)[0]
    torch = re.findall(r"torch (\d+\.\d+) to 2\.(\d+)", said)[0]
    transformers = re.findall(r"transformers (\d+\.\d+) or newer, below (\d+)", said)[0]
    assert project["requires-python"] == f">={python[0]},<3.{int(python[1]) + 1}"
    assert f"torch>={torch[0]},<2.{int(torch[1]) + 1}" in project["dependencies"]
    assert f"transformers>={transformers[0]},<{transformers[1]}" in project["dependencies"]
