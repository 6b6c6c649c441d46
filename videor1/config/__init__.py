"""Every option with its default, range and meaning; ``cli.py`` builds the command line from them."""

from __future__ import annotations

from videor1.config.options import (
    IMAGE_MAX_PIXELS,
    VIDEO_MAX_PIXELS,
    CommonConfig,
    DataConfig,
    DistributedConfig,
    EvalOptions,
    EvaluateConfig,
    JudgeConfig,
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
    "JudgeConfig",
    "LoraConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "TemporalConfig",
    "TrainConfig",
    "VideoConfig",
]
