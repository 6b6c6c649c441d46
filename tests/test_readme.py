"""The README stays true: its options table, its commands' options, its links."""

from __future__ import annotations

import re
from pathlib import Path

from videor1.config import EvaluateConfig, SFTConfig, TrainConfig
from videor1.config.fields import collect_options, options_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_options_table_is_the_programs() -> None:
    assert options_table(TrainConfig) in README


def test_every_option_in_a_command_exists() -> None:
    known = {"train": TrainConfig, "plan": TrainConfig, "sft": SFTConfig, "evaluate": EvaluateConfig}
    commands = re.findall(r"python -m videor1\.(\w+)((?:[^\n`]|\\\n)*)", README)
    assert commands
    for name, rest in commands:
        given = set(re.findall(r"--([\w.]+)", rest)) - {"help", "print_config", "config", "table", "plan", "check"}
        if given:
            assert given <= set(collect_options(known[name])), name


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
