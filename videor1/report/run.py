"""Read a run folder for the report: its options, progress, metrics and skipped samples."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from videor1.config import SFTConfig, TrainConfig
from videor1.config.fields import collect_options
from videor1.config.files import flat_tree
from videor1.errors import ConfigError
from videor1.report.derived import PHASES, with_derived
from videor1.report.metrics import Metrics, read_metrics

SERIES = (
    "loss", "grad_norm", "learning_rate", "epoch", "reward", "rewards/accuracy/mean", "rewards/format/mean",
    "sampling/kl_k3", "sampling/chi2", "sampling/ess", "sampling/truncated", "sampling/masked",
    "frac_reward_zero_std", "kl", "entropy", "clip_ratio/region_mean", "completions/mean_length",
    "completions/max_length", "completions/clipped_ratio", "temporal/p", "temporal/p_shuffled", "temporal/bonus",
    "temporal/rewarded", "rollout/shuffled_asked", "rollout/shuffled_skipped", "rollout/shuffled_stopped",
    "eval/ordered", "eval/shuffled", "eval/image", "time/step", "time/eval", "time/tokens_per_second",
    *(f"time/{phase}" for phase in PHASES),
)  # fmt: skip
LISTED_SKIPS = 100
MOVABLE = ("output_dir", "resume", "disable_tqdm", "run_name", "report_to")  # options that do not change the results


@dataclass
class Skips:
    """The samples that a run skipped."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (split, kind)
    rows: list[dict[str, Any]] = field(default_factory=list)  # the first LISTED_SKIPS lines
    unreadable: int = 0  # number of lines of skipped.jsonl that cannot be read

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass
class Run:
    """The content of a run folder."""

    path: Path
    name: str
    kind: str  # "T-GRPO", "SFT", or "run" if config.yaml does not tell
    options: dict[str, Any]  # by dotted name; empty without a config.yaml
    defaults: dict[str, Any]  # the default of each option, by dotted name
    metrics: Metrics
    skips: Skips
    summary: dict[str, Any]  # the demonstration's summary.json, else empty
    folders: list[Path]  # the run's folder, then those of its other ranks
    written: str  # when metrics.jsonl was last written
    silent: float  # seconds since then
    problems: list[str]  # notes for the page about what could not be read

    def option(self, name: str) -> Any:
        """Return the value of an option, or its default if the run does not tell."""
        return self.options.get(name, self.defaults.get(name))

    @property
    def rollout_files(self) -> list[Path]:
        """The rollouts.jsonl of each rank that has written one."""
        files = [folder / "rollouts.jsonl" for folder in self.folders]
        return [file for file in files if file.is_file() and file.stat().st_size]

    def changed_options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, apart from those in ``MOVABLE``."""
        return {
            name: value
            for name, value in self.options.items()
            if name not in MOVABLE and (name not in self.defaults or value != self.defaults[name])
        }


def load_run(path: str | Path) -> Run:
    """Read the folder of a run that is finished or in progress.

    Raises:
        ConfigError: the path is not the folder of a run.
        DataError: its metrics.jsonl is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        reason = "it is a file" if path.exists() else "there is no such folder"
        raise ConfigError(f"RUN {path}: expected the folder of a run, but {reason}")
    file = path / "metrics.jsonl"
    if not file.is_file() and (results := path / "results.json").is_file():
        raise ConfigError(f"RUN {path}: an evaluation's folder: its tables are in {results}, and it has no page")
    if not file.is_file():
        raise ConfigError(
            f"RUN {path}: no metrics.jsonl in it; expected the folder that videor1.train or videor1.sft wrote "
            "(its output_dir)"
        )
    written = file.stat().st_mtime
    problems: list[str] = []
    options = _options(path / "config.yaml", problems)
    kind = "T-GRPO" if "num_generations" in options else "SFT" if "max_length" in options else "run"
    known = collect_options(SFTConfig if kind == "SFT" else TrainConfig)
    folders = [path, *sorted(path.glob("rank-*"), key=lambda folder: (len(folder.name), folder.name))]
    metrics = with_derived(read_metrics(file, SERIES), int(options.get("num_iterations") or 1))
    if metrics.unfinished:
        problems.append("The last line of metrics.jsonl is not whole (yet): it is left out.")
    return Run(
        path=path,
        name=path.resolve().name,
        kind=kind,
        options=options,
        defaults={name: _as_yaml(option.default) for name, option in known.items()},
        metrics=metrics,
        skips=_skips([folder / "skipped.jsonl" for folder in folders], problems),
        summary=_summary(path / "summary.json", problems),
        folders=folders,
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written)),
        silent=time.time() - written,
        problems=problems,
    )


def _options(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the options in config.yaml by dotted name.

    They are not checked against the known options, because a run of an older version may have others.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"expected a mapping, got {type(tree).__name__}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"config.yaml cannot be read, so the options are not known: {error}")
        return {}
    return dict(flat_tree(tree))


def _as_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _summary(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(f"expected an object, got {type(summary).__name__}")
    except (OSError, ValueError) as error:
        problems.append(f"summary.json cannot be read: {error}")
        return {}
    return summary


def _skips(files: list[Path], problems: list[str]) -> Skips:
    skips = Skips()
    for file in files:
        if not file.exists():
            continue
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    skips.counts[str(row["split"]), str(row["kind"])] += 1
                except (ValueError, KeyError, TypeError):
                    skips.unreadable += bool(line.strip()) and line.endswith(b"\n")
                    continue
                if len(skips.rows) < LISTED_SKIPS:
                    skips.rows.append(row)
    if skips.unreadable:
        problems.append(f"{skips.unreadable} lines of skipped.jsonl cannot be read; they are not counted.")
    return skips
