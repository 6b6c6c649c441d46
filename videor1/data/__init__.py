"""Data files and streams to samples that are decoded ahead of the step."""

from __future__ import annotations

from videor1.data.samples import Dataset, load_samples

__all__ = [
    "Dataset",
    "load_samples",
]
