"""The embedded demonstration: generated clips with questions about time order, a small tokenizer, a tiny model."""

from __future__ import annotations

from pathlib import Path

from videor1.config import TrainConfig
from videor1.errors import ConfigError

DEFAULT = "qwen2_5_vl"  # the family where the option ``demo`` names none


def data_file(run_dir: Path) -> Path:
    """Return the path of the data file that a demonstration trains on."""
    return run_dir / "demo" / "train.json"


def is_demonstration(config: TrainConfig) -> bool:
    """Return whether the options start or resume a demonstration.

    They start one if they name neither a model nor data. They resume one if their data is the data file of the
    demonstration in ``output_dir``, which its config.yaml names.

    Raises:
        ConfigError: they ask for the demonstration, and name a model or data all the same.
    """
    if not (config.model_name_or_path or config.dataset_name):
        return True
    own = data_file(Path(config.output_dir)) if config.resume and config.output_dir else None
    if own and config.dataset_name and Path(config.dataset_name).resolve() == own.resolve():
        return True
    if config.demo:
        raise ConfigError(
            f"demo: {config.demo} makes its own model and data; leave out model_name_or_path and dataset_name, or give "
            "--demo null"
        )
    return False


def demonstration_argv(config: TrainConfig, argv: list[str]) -> list[str]:
    """Return the command line with the demonstration's recipes put before it: the default's, and the family's own.

    When a run is resumed, the command line stays as it is, because the run's config.yaml holds the options.
    """
    resumes = bool(config.resume and config.output_dir) and (Path(str(config.output_dir)) / "config.yaml").is_file()
    if resumes:
        return argv
    recipes = ["demo"] if config.demo in (None, DEFAULT) else ["demo", f"demo_{config.demo}"]
    return [word for recipe in recipes for word in ("--config", recipe)] + argv
