"""The faults that tests are tried with fit the code, and what runs them tells noticed from unnoticed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.__main__ import ROOT, Fault, chosen, load_faults, main, put_in, run

FAULTS = load_faults()


def test_every_fault_fits(tmp_path: Path) -> None:
    """Its old text stands once in its file, another text takes its place, and its tests are there."""
    for fault in FAULTS:
        copy = tmp_path / fault.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / fault.file, copy)
        put_in(fault, tmp_path)
        assert copy.read_text(encoding="utf-8") != (ROOT / fault.file).read_text(encoding="utf-8"), fault.title
        missing = [test for test in fault.tests if not (ROOT / test.partition("::")[0]).exists()]
        assert not missing, fault.title
    assert set(Counter(fault.title for fault in FAULTS).values()) == {1}


def test_what_is_noticed_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "doubled.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_code.py").write_text("from doubled import double\n\n\ndef test():\n    assert double(2) == 4\n")
    old = "2 * x"
    expected = {"3 * x": "killed", "x + x": "survived", "2 *": "pytest ended with 2"}
    for new, outcome in expected.items():
        assert run(Fault("a", "b", "doubled.py", old, new, ("test_code.py",)), tmp_path).startswith(outcome)
    assert "found it 0 times" in run(Fault("a", "b", "doubled.py", "5", new, ("test_code.py",)), tmp_path)
    assert run(Fault("a", "b", "doubled.py", old, new, ("test_gone.py",)), tmp_path).startswith("none of its tests")
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "no fault is named nothing" in capsys.readouterr().err


def test_faults_are_chosen() -> None:
    a, b = (Fault(area, name, "", "", "", ()) for area, name in (("x", "one"), ("y", "two")))
    assert chosen([a, b], []) == [a, b]
    assert chosen([a, b], ["x"]) == [a]
    assert chosen([a, b], ["y:two", "x:two"]) == [b]
