"""videor1: a lean T-GRPO trainer for Qwen2.5-VL on the kernels of ``videor1_kernels``."""

__version__ = "0.1.0"
