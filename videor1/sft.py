"""Train an SFT cold start: ``python -m videor1.sft --model_name_or_path MODEL --dataset_name cot.json``."""

from __future__ import annotations

import sys

from videor1.config import SFTConfig
from videor1.config.cli import parse, run_main
from videor1.report import report_line
from videor1.training.sft import SFTTrainer


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    config = parse(SFTConfig, argv, prog="python -m videor1.sft", description="SFT cold start for T-GRPO.")
    run = SFTTrainer(config)
    final = run.train()
    if run.ranks.is_main:
        print(report_line(run.run_dir))
        print(f"Saved {final}. Next: python -m videor1.train --model_name_or_path {final} --dataset_name DATA.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
