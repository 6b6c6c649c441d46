"""Rewards of completions, and their advantages within the group of completions of a prompt."""

from __future__ import annotations

from videor1.rewards.scoring import accuracy_of, accuracy_reward, format_reward, load_reward, malformed_reason, score

__all__ = ["accuracy_of", "accuracy_reward", "format_reward", "load_reward", "malformed_reason", "score"]
