"""The model: prompts, positions, vision features and hidden states, and its loading and saving."""

from __future__ import annotations

from videor1.model.lm import VideoLM
from videor1.model.load import load_model

__all__ = ["VideoLM", "load_model"]
