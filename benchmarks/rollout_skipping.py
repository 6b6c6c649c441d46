"""The trainer's rollout with and without skipping shuffled completions: what it saves, and that the advantages are
equal."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import whole_number
from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.logs.progress import summary_table
from videor1.rewards.advantages import score_groups
from videor1.training.checkpoint import checkpoints
from videor1.training.tgrpo import Trainer
from videor1.types import Group, Prompt

RULES = (("margin", "advantage"), ("margin", "reward"), ("threshold", "reward"), ("reference", "reward"))
COLUMNS = (
    "checkpoint",
    "rule",
    "apply",
    "shuffled asked",
    "skipped",
    "stopped",
    "row steps",
    "without skipping",
    "saved",
    "completions that differ",
    "advantages differ by",
)
BOUND = 1e-6  # between the advantages of the same completions: they come from other sums


@dataclass
class Measured:
    """All batches of one rule, rolled out with skipping and without."""

    skipping: Counter[str]  # sums of RolloutStats
    plain: Counter[str]
    completions: int = 0  # ordered ones with other tokens: rounding differs with the sequences that are in flight
    difference: float = 0.0  # largest, between the advantages

    @property
    def saved(self) -> float:
        """Share of the row steps."""
        return 1 - self.skipping["row_steps"] / self.plain["row_steps"]


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("skipping", "a trained model: where no completion is right, all is skipped")
    group.add_argument("--skipping", action="store_true", help="measure the skipping of shuffled completions instead")
    group.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="a finished demonstration's (python -m videor1.train): all its checkpoints",
    )
    group.add_argument("--model", type=Path, nargs="+", metavar="FOLDER", help="checkpoints, instead of a run's")
    group.add_argument("--data", type=Path, metavar="FILE", help="training data, instead of the run's")
    group.add_argument("--batches", type=whole_number, default=4, help="of the demonstration's 24 prompts")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, print the table, and return the exit code."""
    models, data = options.model or found_checkpoints(options.run), options.data
    if data is None and options.run is not None:
        data = options.run / "demo" / "train.json"
    if not models or data is None:
        parser.error("--skipping: expected --run FOLDER of a finished demonstration, or --model FOLDER --data FILE")
    rows: list[list[Any]] = [list(COLUMNS)]
    equal = True
    for model in models:
        for (rule, apply), measured in measure(model, data, options.batches, str(options.device)).items():
            equal &= measured.difference <= BOUND  # NaN is not
            rows.append([_short(model), rule, apply, *_cells(measured)])
    print(summary_table(rows))
    print(f"\nadvantages with and without skipping: {'equal' if equal else 'NOT equal'} to {BOUND:.0e}")
    return 0 if equal else 1


def found_checkpoints(run_folder: Path | None) -> list[Path]:
    """Return a demonstration's checkpoints: the cold start that T-GRPO began with, then T-GRPO's own, oldest first."""
    if run_folder is None:
        return []
    cold = [path for _, path in checkpoints(run_folder / "sft")][-1:]
    return cold + [path for _, path in checkpoints(run_folder)]


def measure(model: Path, data: Path, batches: int, device: str) -> dict[tuple[str, str], Measured]:
    """Roll out the first batches of the demonstration's recipe under each rule; the model stays as it is."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_config(model, data, device, Path(folder)))
        config = trainer.config
        with trainer._open():
            taken = [trainer.source.take(config.per_device_train_batch_size) for _ in range(batches)]
            for rule, apply in RULES:
                measured = results[rule, apply] = Measured(Counter(), Counter())
                for prompts in taken:
                    config.temporal = dataclasses.replace(config.temporal, rule=rule, apply=apply)  # type: ignore[arg-type]
                    _compare(trainer, prompts, measured)
    return results


def _compare(trainer: Trainer, prompts: Sequence[Prompt], measured: Measured) -> None:
    """Roll a batch out twice with the same seeds, with and without skipping."""
    config, both = trainer.config, []
    for skip, sums in ((True, measured.skipping), (False, measured.plain)):
        config.temporal = dataclasses.replace(config.temporal, skip_shuffled=skip)
        done, _ = trainer.rollout(prompts)
        sums.update(dataclasses.asdict(done.stats))
        groups = [group for group in done.groups if group is not None]
        both.append((groups, score_groups(groups, config, trainer.model.device).result.advantages))
    (groups, advantages), (other_groups, others) = both
    measured.completions += sum(a != b for a, b in zip(_ids(groups), _ids(other_groups), strict=True))
    difference = float((advantages - others).abs().max())
    measured.difference = math.nan if math.isnan(difference) else max(measured.difference, difference)


def _config(model: Path, data: Path, device: str, folder: Path) -> TrainConfig:
    """The demonstration's options, without a reference model and without evaluations."""
    flags = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": folder,
        "device": device,
        "beta": 0,
        "eval_steps": 0,
        "data.workers": 0,
        "disable_tqdm": "true",
    }
    arguments = ["--config=demo", *(f"--{name}={value}" for name, value in flags.items())]
    return parse(TrainConfig, arguments, prog="python -m benchmarks.rollout --skipping", description="")


def _ids(groups: Sequence[Group]) -> list[list[int]]:
    return [completion.token_ids.tolist() for group in groups for completion in group.ordered]


def _cells(measured: Measured) -> list[Any]:
    with_, without = measured.skipping, measured.plain
    return [
        with_["shuffled_asked"],
        with_["shuffled_skipped"],
        with_["shuffled_stopped"],
        with_["row_steps"],
        without["row_steps"],
        f"{measured.saved:.1%}",
        measured.completions,
        f"{measured.difference:.1e}",
    ]


def _short(model: Path) -> str:
    """The last folders of a checkpoint's path that tell it from its run's others."""
    parts = model.parts[-3:] if "sft" in model.parts[-3:] else model.parts[-1:]
    return "/".join(parts)
