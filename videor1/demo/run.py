"""Run the embedded demonstration: a user's whole path on generated data.

It generates clips, trains an SFT cold start and then T-GRPO, and evaluates on held-out questions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from videor1.atomic import write_atomic
from videor1.config import SFTConfig, TrainConfig
from videor1.config.cli import load_config, parse, resume_command, save_run_config
from videor1.data import load_samples
from videor1.demo import DEFAULT, data_file
from videor1.demo.assets import Assets, make_assets
from videor1.errors import ConfigError
from videor1.evaluation.evaluator import Evaluation, Evaluator
from videor1.logs.lock import FolderLock
from videor1.logs.progress import summary_table
from videor1.model import load_model
from videor1.model.families import FAMILIES
from videor1.model.load import pick_device
from videor1.report import report_line
from videor1.report.curves import draw_curves
from videor1.side_by_side import one_thread_each
from videor1.training.loop import check_unused, holds_run
from videor1.training.sft import SFTTrainer
from videor1.training.tgrpo import Trainer


def run_demo(argv: list[str]) -> int:
    """Run the demonstration with the options of its T-GRPO stage.

    It writes ``summary.json`` into the run folder and prints it as a table.

    Args:
        argv: the command line.

    Returns:
        The exit code.

    Raises:
        ConfigError: the options name their own data, or the run folder belongs to another run.
    """
    started = time.perf_counter()
    config = parse(TrainConfig, argv, prog="python -m videor1.train", description="")
    if config.data.root or (config.data.eval_path and not config.dataset_name):
        raise ConfigError("data.root, data.eval_path: the demonstration makes its own data; name your model and data")
    if pick_device(config.device).type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        one_thread_each()  # The operations of such a small model gain little from more.
    run_dir = Path(config.output_dir or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    _check_folder(run_dir, config)
    print(f"No model and no data given: running the embedded demonstration in {run_dir}", flush=True)
    try:
        with FolderLock(run_dir, "videor1.train"):
            _check_folder(run_dir, config)  # Another process may have begun there before this one had the lock.
            if not (run_dir / "config.yaml").exists():  # needed to resume in a stage before T-GRPO
                data = str(data_file(run_dir))
                save_run_config(dataclasses.replace(config, dataset_name=data), run_dir, run_dir)
            return _stages(config, run_dir, started)
    except KeyboardInterrupt:  # The stage's own message names its folder, from which no demonstration can be resumed.
        raise KeyboardInterrupt(f"go on with: {resume_command('train', run_dir)}") from None


def _check_folder(run_dir: Path, config: TrainConfig) -> None:
    """Raise a ConfigError if the folder holds another run, so that it is left as it is."""
    if not config.resume:
        check_unused(run_dir)
    elif holds_run(run_dir) and not data_file(run_dir).exists():
        raise ConfigError(
            f"output_dir: {run_dir} holds a run that is not the demonstration's, and no config.yaml that tells its "
            "options; give model_name_or_path, dataset_name and its other options again"
        )


def _stages(config: TrainConfig, run_dir: Path, started: float) -> int:
    family = FAMILIES[config.demo or DEFAULT]
    print(f"1/4  making clips, questions, a tokenizer and a tiny {family.name}", flush=True)
    progress = not config.disable_tqdm
    assets = make_assets(run_dir / "demo", seed=config.seed, progress=progress, family=family.model_type)

    print("2/4  SFT cold start, which stops while completions are partly right", flush=True)
    cold_start = SFTTrainer(_sft_config(config, assets, run_dir)).train()

    print("3/4  T-GRPO (p, p~: accuracy from frames in order, shuffled; —: not known)", flush=True)
    config = dataclasses.replace(
        config,
        model_name_or_path=str(cold_start),
        dataset_name=str(assets.train),
        output_dir=str(run_dir),
        data=dataclasses.replace(config.data, eval_path=str(assets.dev)),
    )
    trainer = Trainer(config)
    final = trainer.train()

    print("4/4  held-out evaluation", flush=True)
    before, after = evaluate(config, assets.test, [cold_start, final])
    summary = {
        "before": _accuracy(before),
        "after": _accuracy(after),
        "chance": assets.chance,
        "steps": trainer.step,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomic(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    draw_curves(run_dir)
    print(f"\n{_table(before, after, assets.chance)}\n")
    print(f"{trainer.step} T-GRPO steps, {summary['seconds']:.0f} seconds in all. Run folder: {run_dir}")
    print(report_line(run_dir))
    print("  curves.png  rollouts.jsonl (every completion)  metrics.jsonl  checkpoints/  demo/ (the made data)")
    print("Next, your own data:")
    recipe = FAMILIES[config.demo or DEFAULT].recipes[:2][-1]  # of the second size, if there is one
    print(f"  python -m videor1.train --config {recipe} --model_name_or_path MODEL --dataset_name DATA.json")
    return 0


def evaluate(config: TrainConfig, data: Path, models: list[Path]) -> list[Evaluation]:
    """Evaluate several checkpoints on the same samples, each of which is decoded once."""
    config = dataclasses.replace(config, eval_samples=0)
    rules = FAMILIES[config.demo or DEFAULT].frames
    with Evaluator(load_samples(data), config, rules=rules) as evaluator:
        return [
            evaluator.run(load_model(dataclasses.replace(config, model_name_or_path=str(model)))) for model in models
        ]


def _sft_config(config: TrainConfig, assets: Assets, run_dir: Path) -> SFTConfig:
    recipe = load_config(SFTConfig, "sft_demo")
    return dataclasses.replace(
        recipe,
        model_name_or_path=str(assets.model),
        dataset_name=str(assets.sft),
        output_dir=str(run_dir / "sft"),
        data=dataclasses.replace(recipe.data, eval_path=str(assets.dev)),
        video=config.video,
        model=config.model,
        seed=config.seed,
        device=config.device,
        resume=config.resume and "auto",
        disable_tqdm=config.disable_tqdm,
    )


def _accuracy(result: Evaluation) -> dict[str, float]:
    return {"ordered": result.ordered, "shuffled": result.shuffled}


def _table(before: Evaluation, after: Evaluation, chance: float) -> str:
    rows: list[list[Any]] = [["held-out accuracy", "cold start", "T-GRPO", "guessing"]]
    rows.append(["frames in order", before.ordered, after.ordered, chance])
    rows.append(["frames shuffled", before.shuffled, after.shuffled, chance])
    images = [result.metrics().get("eval/image") for result in (before, after)]
    return summary_table([*rows, ["still images", *images, 0.25]])
