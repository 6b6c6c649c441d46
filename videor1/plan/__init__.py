"""A memory plan of a T-GRPO run: ``python -m videor1.train --plan [options]``."""
