"""Every option with its default and its meaning; ``cli.py`` makes the command line of them."""

from __future__ import annotations

from videor1.config.options import (
    COMPAT,
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
    check_common,
    check_eval,
)

__all__ = [
    "COMPAT",
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
    "check_common",
    "check_eval",
]
