"""Write the report of one or several runs: a single HTML page that needs nothing but a browser.

The report is written by ``python -m videor1.report RUN [RUN ...]`` or by :func:`write_report`. It reads the files that
a run folder already holds (config.yaml, metrics.jsonl, rollouts.jsonl, skipped.jsonl, summary.json), so it also works
on a run in progress.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from videor1.atomic import write_atomic
from videor1.errors import ConfigError


def write_report(runs: Sequence[str | Path] | str | Path, out: str | Path | None = None, *, rollouts: int = 40) -> Path:
    """Write the report of one or several run folders and return its path.

    Args:
        runs: run folders, finished or in progress. Several runs are compared in the same charts.
        out: the file to write; default: ``report.html`` in the run's folder, or in the current folder for several runs.
        rollouts: number of prompts to show with their completions, of all runs together and evenly over their steps.
            Fewer are shown, with a note, if the page would grow by more than about 8 MB.

    Raises:
        ConfigError: a folder is not a run's, a run is named twice, or ``out`` cannot be written.
        DataError: a metrics.jsonl is damaged before its last line.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    if not folders:
        raise ConfigError("RUN: expected at least one run folder")
    if rollouts < 0:
        raise ConfigError(f"rollouts: expected 0 (none) or more, got {rollouts}")
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise ConfigError(f"RUN {folder}: given twice")
    path = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if path.is_dir():
        raise ConfigError(f"--out {path}: expected the file to write, got a folder")
    from videor1.report.page import render  # imported here, so that --help of the command needs no plotly and no torch
    from videor1.report.run import load_run

    loaded = [load_run(folder) for folder in folders]
    for run, name in zip(loaded, _names(folders), strict=True):
        run.name = name
    page = render(loaded, rollouts)
    try:
        write_atomic(path, page)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error}") from error
    return path


def report_line(run_dir: Path) -> str:
    """Write the report of a run that has ended, and return a line for the user.

    This never raises an error, because a run must not fail by its report.
    """
    try:
        return f"Report: {write_report(run_dir)}"
    except Exception as error:  # The run's results are on disk already, so any error is only reported.
        reason, shown = " ".join(str(error).split()), shlex.quote(str(run_dir))
        return f"The report could not be written ({type(error).__name__}: {reason}); python -m videor1.report {shown}"


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, each with as many parents as are needed to tell the folders apart."""
    depth, parts = 1, [folder.resolve().parts for folder in folders]
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
