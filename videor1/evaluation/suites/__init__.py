"""The benchmarks that Video-R1 is evaluated on, from local files as their authors publish them."""

from __future__ import annotations

from pathlib import Path

from videor1.data import Dataset
from videor1.errors import ConfigError, did_you_mean
from videor1.evaluation.suites import mmvu, mvbench, tempcompass, videomme, videommmu, vsibench
from videor1.evaluation.suites.base import Loaded, Overall, Question, Suite
from videor1.evaluation.suites.datafile import from_dataset

__all__ = ["SUITES", "Dataset", "Loaded", "Overall", "Question", "Suite", "find_suite", "from_dataset", "load_suite"]

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE for module in (mmvu, mvbench, tempcompass, videomme, videommmu, vsibench)
}


def find_suite(name: str) -> Suite:
    """The benchmark of a name; case, "-" and "_" do not count. Raises ConfigError, which suggests the nearest."""
    folded = name.casefold().replace("-", "").replace("_", "")
    if folded in SUITES:
        return SUITES[folded]
    raise ConfigError(f"benchmark: expected one of {', '.join(SUITES)}, got {name!r}{did_you_mean(folded, SUITES)}")


def load_suite(name: str, root: str | Path) -> Loaded:
    """The questions of a benchmark whose files are in ``root/<name>``. Raises ConfigError and DataError."""
    return find_suite(name).load(root)
