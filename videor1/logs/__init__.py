"""Logging of a run: JSON lines files, trackers, a progress bar and tables."""
