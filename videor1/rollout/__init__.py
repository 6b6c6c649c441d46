"""Rollout: answers to prompts from ordered and from shuffled frames, from an engine behind a small protocol."""

from __future__ import annotations

import warnings
from pathlib import Path

from videor1.checkpoint import save_model
from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.rollout.cache import MIB
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
    chosen = config.rollout
    if chosen.engine == "server":
        from videor1.rollout.server import ServerEngine

        if model.position_rule != "paper":
            warnings.warn(
                f"model.positions {model.position_rule}: vLLM and SGLang number text after a video by the rule paper; "
                "their answers to clips of more than a few seconds come from another policy than this one",
                stacklevel=2,
            )
        return ServerEngine(
            url=chosen.url, model=chosen.model, tokenizer=model.tokenizer, special=model.special, options=options,
            shuffle_unit=config.temporal.shuffle_unit, timeout=chosen.timeout, retries=chosen.retries,
            concurrency=chosen.concurrency, save_weights=lambda folder: save_model(model, folder),
            sync_dir=run_dir / "policy", sync=chosen.sync,
        )  # fmt: skip
    return LocalEngine(
        model, options, max_rows=config.rollout_batch_size, backend=config.kernels, cuda_graphs=chosen.cuda_graphs,
        kv_bytes=None if chosen.kv_mib is None else chosen.kv_mib * MIB,
    )  # fmt: skip
