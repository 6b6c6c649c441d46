"""Answers of a model to held-out samples and benchmarks, and their accuracy."""
