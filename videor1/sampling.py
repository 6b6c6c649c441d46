"""How completions are drawn (by ``videor1_kernels.sample_tokens``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingOptions:
    """How a completion is drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
