"""The embedded default: made clips with questions about time order, a small tokenizer and a tiny Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

from videor1.config import TrainConfig


def data_file(run_dir: Path) -> Path:
    """What a demonstration trains on."""
    return run_dir / "demo" / "train.json"


def is_demonstration(config: TrainConfig) -> bool:
    """Neither model nor data are named, or a demonstration is to be gone on with: its config.yaml names its data."""
    if not (config.model_name_or_path or config.dataset_name):
        return True
    if not (config.resume and config.output_dir and config.dataset_name):
        return False
    return Path(config.dataset_name).resolve() == data_file(Path(config.output_dir)).resolve()


def demonstration_argv(config: TrainConfig, argv: list[str]) -> list[str]:
    """The command line with the recipe under it, but where the options of a run are there to go on with."""
    run = bool(config.resume and config.output_dir) and (Path(str(config.output_dir)) / "config.yaml").is_file()
    return argv if run else ["--config", "demo", *argv]
