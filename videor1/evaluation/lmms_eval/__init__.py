"""The integration with lmms-eval: a model class and its entry point."""
