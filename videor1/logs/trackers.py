"""Writing a run's metrics to metrics.jsonl and to tracking services."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from videor1.errors import ConfigError, install
from videor1.logs.jsonl import JsonlWriter, json_value


class Tracker(Protocol):
    """A service that metrics are sent to in addition to metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes metrics to the metrics.jsonl of a run folder and to the trackers of ``report_to``.

    Args:
        run_dir: the run folder.
        report_to: any of tensorboard, wandb, trackio.
        run_name: name of the run in the trackers; default: the folder's name.
        config: a dataclass that trackers show as the run's settings.
        resume_step: step of the checkpoint that the run is resumed from; lines of later steps are removed.

    Raises:
        ConfigError: a tracker's package is not installed.
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
        # The file is opened last, so that a tracker that cannot start does not leave a folder that looks like a run's.
        self._trackers = [TRACKERS[kind](run_dir, name, settings, resume_step) for kind in report_to]
        self._jsonl = JsonlWriter(run_dir / "metrics.jsonl", resume_step=resume_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of ``step`` as one line; trackers get only the finite numbers among them."""
        self._jsonl.write(step, metrics)
        if self._trackers:
            values = {key: json_value(value) for key, value in metrics.items() if key != "step"}
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
    """Import a tracker's package. Raises a ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"report_to {extra}: {error}; {install(extra)}") from None
