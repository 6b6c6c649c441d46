"""videor1: a lean T-GRPO trainer for Qwen2-VL, Qwen2.5-VL and Qwen3-VL on the kernels of ``videor1_kernels``."""

from importlib import metadata

try:
    __version__ = metadata.version("videor1")  # pyproject.toml has the number
except metadata.PackageNotFoundError:
    __version__ = "unknown"  # a checkout that is not installed
