"""Train with T-GRPO: ``python -m videor1.train``. Without a model and data it runs the embedded demonstration."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from videor1.config import TrainConfig
from videor1.config.cli import parse, run_main
from videor1.demo import demonstration_argv, is_demonstration
from videor1.errors import ConfigError

if TYPE_CHECKING:
    from videor1.training.tgrpo import Trainer


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        return _plan([argument for argument in argv if argument != "--plan"])
    # --print_config prints and exits while the options are parsed. The demonstration has to print its own options, so
    # whether this is one is found out first, without the flag.
    config = _parse([argument for argument in argv if argument != "--print_config"])
    demonstration = is_demonstration(config)
    if not demonstration and not (config.model_name_or_path and config.dataset_name):
        missing = "dataset_name" if config.model_name_or_path else "model_name_or_path"
        raise ConfigError(f"{missing}: give model_name_or_path and dataset_name, or neither for the demonstration")
    if "--print_config" in argv:
        _parse(demonstration_argv(config, argv) if demonstration else argv)
    # These are imported here, because decode workers import this file again and must start quickly.
    if demonstration:
        from videor1.demo.run import run_demo

        return run_demo(demonstration_argv(config, argv))
    from videor1.plan.layers import choose_layers
    from videor1.report import report_line
    from videor1.report.curves import draw_curves
    from videor1.training.tgrpo import Trainer

    trainer = Trainer(config, choose_layers)
    _plan_room(trainer)
    final = trainer.train()
    if not trainer.ranks.is_main:
        return 0
    picture = draw_curves(trainer.run_dir)
    print(f"Saved {final}. Curves: {picture}. Completions: {trainer.run_dir / 'rollouts.jsonl'}")
    print(report_line(trainer.run_dir))
    return 0


def _plan_room(trainer: Trainer) -> None:
    """Tell the engine of rollouts on a GPU how much of its memory the plan of the run leaves it beside training."""
    import torch

    from videor1.plan.plan import plan
    from videor1.rollout import LocalEngine

    engine, rollout = trainer.engine, trainer.config.rollout
    decides = "auto" in (rollout.keep_cache, rollout.decode_weights)
    if trainer.model.device.type != "cuda" or not isinstance(engine, LocalEngine) or not decides:
        return
    with contextlib.suppress(ConfigError):  # There is no plan of this model, or of several processes.
        engine.room = plan(trainer.config).room(torch.cuda.mem_get_info(trainer.model.device)[1])


def _plan(argv: list[str]) -> int:
    """Print the memory plan of a run with these options. This needs neither its data nor its weights."""
    from videor1.plan.table import print_plan

    config = _parse(argv)
    return print_plan(config if config.model_name_or_path else _parse(demonstration_argv(config, argv)))


def _parse(argv: list[str]) -> TrainConfig:
    return parse(
        TrainConfig,
        argv,
        prog="python -m videor1.train",
        description="Train a video language model with T-GRPO. Without arguments: an embedded demonstration, on any "
        "machine. With --plan: print what the run would take of a GPU's memory, and exit; no GPU and no weights are "
        "needed.",
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
