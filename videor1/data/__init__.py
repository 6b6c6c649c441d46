"""Read data files and streams into samples, and decode their media ahead of the training step."""

from __future__ import annotations

from videor1.data.samples import Dataset, load_samples

__all__ = ["Dataset", "load_samples"]
