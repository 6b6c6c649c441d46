"""Every option with its default, its range and its meaning; ``cli.py`` makes the command line of them."""

from __future__ import annotations

from videor1.config.options import (
    IMAGE_MAX_PIXELS,
    VIDEO_MAX_PIXELS,
    CommonConfig,
    DataConfig,
    DistributedConfig,
    EvalOptions,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    TemporalConfig,
    TrainConfig,
    VideoConfig,
)

__all__ = [
    "IMAGE_MAX_PIXELS",
    "VIDEO_MAX_PIXELS",
    "CommonConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalOptions",
    "EvaluateConfig",
    "LoraConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "TemporalConfig",
    "TrainConfig",
    "VideoConfig",
]
