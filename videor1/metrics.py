"""What a run writes down and shows: metrics.jsonl, rollouts.jsonl, trackers, the progress bar, a summary table.

Metric names are TRL's (``loss``, ``reward``, ``completions/mean_length``, ...) plus ``temporal/*`` and ``time/*``.
Everything measured with a clock, or decided by what a cache holds, is named ``time/...``: the rest of a resumed run
equals an uninterrupted run's.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from videor1.errors import ConfigError, DataError, install


class JsonlWriter:
    """Appends one JSON object a line, each written with one system call, so that a kill leaves at most one partial
    last line; that line is removed when the file is opened again.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        """Open for appending. ``resume_step`` N drops the lines of later steps, which the resumed run writes again."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._rewrite(resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the writer)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append ``row`` with ``step`` first and the other keys sorted; NaN and Inf become null.

        Tensors and arrays become numbers or lists.
        """
        line = {"step": int(step)} | {key: _json_value(row[key]) for key in sorted(row) if key != "step"}
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        while data:  # a write to a nearly full disk may take only a part
            data = data[self._file.write(data) :]

    def truncate_after(self, step: int) -> None:
        """Drop the lines whose step is above ``step``."""
        self._file.close()
        self._rewrite(step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, last_step: int | None) -> None:
        """Replace the file by its whole lines up to ``last_step``; left alone where nothing changes."""
        old = self.path.read_bytes()
        kept = [line for line, row in _lines(self.path, old) if last_step is None or row.get("step", 0) <= last_step]
        new = b"".join(line + b"\n" for line in kept)
        if new != old:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with open(temporary, "wb") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A partial last line (the writer was killed) is left out.

    Raises DataError where any other line is not a JSON object.
    """
    path = Path(path)
    return [row for _, row in _lines(path, path.read_bytes())]


def _lines(path: Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number == lines[-1][0]:
                break
            raise DataError(f"{path}:{number}: not a JSON object: {error}; repair or remove the line") from None
        rows.append((line, row))
    return rows


def _json_value(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class Tracker(Protocol):
    """A service that shows metrics beside metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """metrics.jsonl of a run folder, and the trackers of ``report_to``.

    Args:
        run_dir: the run folder.
        report_to: any of tensorboard, wandb, trackio; ConfigError where the package is missing.
        run_name: the name trackers show; default: the folder's name.
        config: a dataclass that trackers show as the run's settings.
        resume_step: the checkpoint's step where the run goes on from one: later lines are dropped.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        report_to: Sequence[str] = (),
        run_name: str | None = None,
        config: Any = None,
        resume_step: int | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        name = run_name or run_dir.resolve().name
        settings = {} if config is None else dataclasses.asdict(config)
        # The file last: a tracker that cannot start must not leave a folder that looks like a run's.
        self._trackers = [TRACKERS[kind](run_dir, name, settings, resume_step) for kind in report_to]
        self._jsonl = JsonlWriter(run_dir / "metrics.jsonl", resume_step=resume_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line for ``step``. Trackers get the finite numbers of it."""
        self._jsonl.write(step, metrics)
        if self._trackers:
            values = {key: _json_value(value) for key, value in metrics.items() if key != "step"}
            numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
            for tracker in self._trackers:
                tracker.log(step, numbers)

    def close(self) -> None:
        self._jsonl.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    def __init__(self, run_dir: Path, name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge)
        if resume_step is None:
            self._writer.add_text("config", "```json\n" + json.dumps(settings, indent=2, default=str) + "\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        module = _import("wandb", "wandb")
        id_file = run_dir / "wandb_id.txt"
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        project = os.environ.get("WANDB_PROJECT", "videor1")
        self._run = module.init(
            project=project, name=name, id=id_file.read_text(), resume="allow", dir=str(run_dir), config=settings
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run_dir: Path, name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        self._module = _import("trackio", "trackio")
        resume = "never" if resume_step is None else "allow"
        self._module.init(
            project=os.environ.get("TRACKIO_PROJECT", "videor1"), name=name, config=settings, resume=resume
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"report_to {extra}: {error}; {install(extra)}") from None


class Progress:
    """A progress bar on a terminal; elsewhere (a log file) a plain line now and then.

    Args:
        total: steps of the whole run.
        initial: steps done before this start (resume).
        description: the word in front.
        unit: what a step is called.
        disabled: show no progress.
        silent: write no messages either.
        stream: default stderr.
        every: seconds between plain lines at most; a tenth of the run also makes a line.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        unit: str = "step",
        disabled: bool = False,
        silent: bool = False,
        stream: TextIO | None = None,
        every: float = 30.0,
    ) -> None:
        self._silent = silent
        self._total, self._initial, self._done = total, initial, initial
        self._description, self._unit, self._every = description, unit, every
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last_line = time.monotonic()
        self._plain = not disabled and not self._stream.isatty()
        self._bar = tqdm(
            total=total, initial=initial, desc=description or None, file=self._stream,
            disable=disabled or self._plain, dynamic_ncols=True, unit=unit,
        )  # fmt: skip

    def update(self, values: Mapping[str, float | None], steps: int = 1) -> None:
        """``steps`` more are done; ``values`` by label, e.g. ``{"loss": 0.1, "p~": None}``; None and NaN show as —."""
        before, self._done = self._done, self._done + steps
        shown = ", ".join(f"{label}={_short(value)}" for label, value in values.items())
        if self._plain:
            tenth = 10 * self._done // max(1, self._total) > 10 * before // max(1, self._total)
            if tenth or self._done >= self._total or time.monotonic() - self._last_line >= self._every:
                self._line(shown)
        else:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(steps)

    def write(self, message: str) -> None:
        """A line of text that does not break the bar; shown where the bar is disabled too."""
        if not self._silent:
            tqdm.write(message, file=self._stream)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, shown: str) -> None:
        self._last_line = time.monotonic()
        line = tqdm.format_meter(
            self._done, self._total, self._last_line - self._start, initial=self._initial,
            unit=self._unit, prefix=self._description and f"{self._description}: ", postfix=shown,
            bar_format="{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )  # fmt: skip
        print(line, file=self._stream, flush=True)


def _short(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def summary_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as plain text in columns; the first row is the header, the first column is left-aligned.

    Floats show three decimals, None and NaN a dash.
    """

    def text(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "—"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *rest in cells:
        columns = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(columns).rstrip())
    return "\n".join(lines)
