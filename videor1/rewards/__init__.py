"""What an answer earns, and what that makes of it among the answers to its prompt."""

from __future__ import annotations

from videor1.rewards.scoring import accuracy_of, accuracy_reward, format_reward, load_reward, score

__all__ = [
    "accuracy_of",
    "accuracy_reward",
    "format_reward",
    "load_reward",
    "score",
]
