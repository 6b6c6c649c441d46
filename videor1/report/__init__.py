"""The report of one or several runs: a single HTML page that needs nothing but a browser.

``python -m videor1.report RUN [RUN ...]``, or :func:`write_report`. It reads what a run folder holds by now
(config.yaml, metrics.jsonl, rollouts.jsonl, skipped.jsonl, summary.json), so it works on a run in progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from videor1.atomic import write_atomic
from videor1.errors import ConfigError


def write_report(runs: Sequence[str | Path] | str | Path, out: str | Path | None = None, *, rollouts: int = 40) -> Path:
    """Write the report of one or several run folders; returns its path.

    Args:
        runs: run folders, finished or in progress. Several are compared in the same charts.
        out: the file to write; default: ``report.html`` in the run's folder, of several runs in the current folder.
        rollouts: prompts with their answers to look through, of all runs together, evenly over their steps; fewer
            where the page would grow by more than about 8 MB, and then it says so.

    Raises:
        ConfigError: a folder that is no run's, a run named twice, or an ``out`` that cannot be written.
        DataError: a metrics.jsonl that is broken before its last line.
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
    from videor1.report.page import render  # here: a command's --help needs neither plotly nor torch
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
    """Write a run's report at its end; what to tell the user. Never raises: a run must not fail by its report."""
    try:
        return f"Report: {write_report(run_dir)}"
    except Exception as error:  # whatever it is, the run's results are on disk already
        reason = " ".join(str(error).split())
        return f"The report could not be written ({type(error).__name__}: {reason}); python -m videor1.report {run_dir}"


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    depth, parts = 1, [folder.resolve().parts for folder in folders]
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
