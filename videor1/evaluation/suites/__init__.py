"""The benchmarks that Video-R1 is evaluated on, read from local files in the form that their authors publish."""

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
    """Return the benchmark with a name, in which case, "-" and "_" are ignored.

    Raises:
        ConfigError: there is no such benchmark; the message suggests the nearest name.
    """
    folded = name.casefold().replace("-", "").replace("_", "")
    if folded in SUITES:
        return SUITES[folded]
    raise ConfigError(f"benchmark: expected one of {', '.join(SUITES)}, got {name!r}{did_you_mean(folded, SUITES)}")


def load_suite(name: str, root: str | Path) -> Loaded:
    """Load the questions of a benchmark whose files are in ``root/<name>``.

    Raises:
        ConfigError: there is no such benchmark, or a package that its files need is not installed.
        DataError: its files are missing or hold no usable question.
    """
    return find_suite(name).load(root)
