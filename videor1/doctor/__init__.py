"""Report what this machine can run: ``python -m videor1.doctor``."""
