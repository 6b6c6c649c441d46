"""Plan the memory of a T-GRPO run: ``python -m videor1.train --plan [options]``."""
