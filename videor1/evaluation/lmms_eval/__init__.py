"""The model class and the entry point for lmms-eval."""
