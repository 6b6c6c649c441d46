"""Rollout: sampling completions of prompts, from ordered and from shuffled frames, by an engine behind a protocol."""

from __future__ import annotations

import warnings
from pathlib import Path

from videor1.config import TrainConfig
from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.model.save import save_model
from videor1.rollout.local.engine import LocalEngine
from videor1.rollout.local.kv_cache import MIB
from videor1.rollout.local.weights import Gathered
from videor1.rollout.protocol import (
    Branch,
    Judge,
    LateScores,
    Request,
    Rollout,
    RolloutEngine,
    RolloutError,
    RolloutStats,
    SamplingOptions,
)

__all__ = [
    "Branch",
    "Judge",
    "LateScores",
    "LocalEngine",
    "Request",
    "Rollout",
    "RolloutEngine",
    "RolloutError",
    "RolloutStats",
    "SamplingOptions",
    "make_engine",
]


def make_engine(config: TrainConfig, model: VideoLM, run_dir: Path, gathered: Gathered | None = None) -> RolloutEngine:
    """Create the engine that ``config.rollout`` names, for training.

    Args:
        gathered: gathers parameters, where each process holds only its part of them.
    """
    options = SamplingOptions(config.max_completion_length, config.temperature, config.top_p, config.top_k)
    rollout = config.rollout
    if rollout.engine == "server":
        from videor1.rollout.server.answer import logp_warning
        from videor1.rollout.server.engine import ServerEngine

        if model.family.server_video is None:
            raise ConfigError(f"rollout.engine: server: not with {model.family.name} yet; use local")
        if model.position_rule != "paper":
            warnings.warn(
                f"model.positions {model.position_rule}: vLLM and SGLang number text after a video by the rule paper; "
                "their answers to clips of more than a few seconds come from another policy than this one",
                stacklevel=2,
            )
        if warning := logp_warning(options):
            warnings.warn(warning, stacklevel=2)
        return ServerEngine(
            url=rollout.url,
            model=rollout.model,
            tokenizer=model.tokenizer,
            special=model.special,
            family=model.family,
            options=options,
            shuffle_unit=config.temporal.shuffle_unit,
            timeout=rollout.timeout,
            retries=rollout.retries,
            concurrency=rollout.concurrency,
            save_weights=lambda folder: save_model(model, folder),
            sync_dir=run_dir / "policy",
            sync=rollout.sync,
        )
    return LocalEngine(
        model,
        options,
        max_rows=config.rollout_batch_size,
        backend=config.kernels,
        cuda_graphs=rollout.cuda_graphs,
        keep_cache=rollout.keep_cache,
        decode_weights=rollout.decode_weights,
        gathered=gathered,
        kv_bytes=None if rollout.kv_mib is None else rollout.kv_mib * MIB,
    )
