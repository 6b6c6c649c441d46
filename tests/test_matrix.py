"""The command that runs the tests in several environments: what it selects, counts and prints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests import matrix

ROOT = Path(__file__).resolve().parents[1]


def test_every_selected_file_exists() -> None:
    selected = {*matrix.NUMERIC, *(file for cell in matrix.CELLS.values() for file in cell.files)}
    assert [file for file in sorted(selected) if not (ROOT / file).exists()] == []


def test_the_page_names_every_cell() -> None:
    page = (ROOT / "docs/develop/testing.md").read_text(encoding="utf-8")
    assert [name for name in matrix.CELLS if f"`{name}`" not in page] == []
    for cell in matrix.CELLS.values():
        assert all(f"`{name}={value}`" in page for name, value in cell.variables.items())


def test_pins_are_the_lowest_supported_versions_of_every_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for package in [*(pin for cell in matrix.CELLS.values() for pin in cell.packages), *pins]:
        name, version = package.removesuffix(".*").split("==")
        floor = re.search(rf'"{name}(?:\[\w+\])?>=([\d.]+)', text)
        assert floor, name
        assert f"{version}.".startswith(f"{floor[1]}."), (package, floor[1])
    needed = {re.split(r"[\[>;]", package)[0] for package in tomllib.loads(text)["project"]["dependencies"]}
    needed |= {"pyarrow"}  # the tests need it
    assert {pin.partition("==")[0] for pin in pins} == needed
    assert {pin.partition("==")[0] for pin in matrix.CELLS["lowest"].packages} == needed - {"torch", "triton"}


def test_a_run_in_one_cell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_cell.py"
    file.write_text(
        "import os, pytest\n"
        "def test_variable(): assert os.environ['VIDEOR1_TEST_THREADS'] == '2'\n"
        "def test_wrong(): assert False\n"
        "def test_left_out(): pytest.skip()\n"
    )
    assert matrix.main(["--only", "two-threads", "--", str(file), "-p", "no:cacheprovider"]) == 1
    machine, head, row = capfd.readouterr().out.splitlines()[-3:]
    assert "torch" in machine
    assert head.split() == ["cell", "passed", "failed", "skipped", "seconds"]
    assert row.split()[:4] == ["two-threads", "1", "1", "1"]


def test_an_unknown_cell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--only", "default,avx3"])
    assert "got avx3" in capsys.readouterr().err


def test_what_ends_without_a_count_is_no_success(tmp_path: Path) -> None:
    counts = tmp_path / "counts.xml"
    counts.write_text('<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0"/></testsuites>')
    assert matrix.read_counts("default", counts, 1.0, 5).broken == "pytest ended with 5"
