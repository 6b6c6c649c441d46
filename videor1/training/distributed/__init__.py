"""Distributed training: the ranks of a run, and the operations that they do together."""

from __future__ import annotations

import os

from videor1.config import CommonConfig
from videor1.errors import ConfigError
from videor1.training.distributed.ranks import Ranks


def make_ranks(config: CommonConfig) -> Ranks:
    """Return the ranks that ``distributed.engine`` asks for.

    Raises:
        ConfigError: a launcher started several processes but no engine is configured, or its package is missing.
    """
    if config.distributed.engine == "deepspeed":
        from videor1.training.distributed.zero import ZeroRanks

        return ZeroRanks(config.distributed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"distributed.engine: none, but a launcher started {os.environ['WORLD_SIZE']} processes; use deepspeed"
        )
    return Ranks()
