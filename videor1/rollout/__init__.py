"""Rollout: answers to prompts from ordered and from shuffled frames, from an engine behind a small protocol."""

from __future__ import annotations

from pathlib import Path

from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.rollout.engine import LocalEngine
from videor1.rollout.protocol import Branch, Judge, Request, Rollout, RolloutEngine, RolloutError, RolloutStats
from videor1.rollout.skipping import TemporalJudge
from videor1.sampling import SamplingOptions

__all__ = [
    "Branch",
    "Judge",
    "LocalEngine",
    "Request",
    "Rollout",
    "RolloutEngine",
    "RolloutError",
    "RolloutStats",
    "TemporalJudge",
    "make_engine",
]


def make_engine(config: TrainConfig, model: VideoLM, run_dir: Path) -> RolloutEngine:
    """The engine that ``config.rollout`` names, for training."""
    options = SamplingOptions(config.max_completion_length, config.temperature, config.top_p, config.top_k)
    kv_bytes = None if config.rollout.kv_mib is None else config.rollout.kv_mib * 2**20
    return LocalEngine(
        model, options, max_rows=config.rollout_batch_size, kv_bytes=kv_bytes, backend=config.kernels,
        cuda_graphs=config.rollout.cuda_graphs,
    )  # fmt: skip
