"""Speed, memory and accuracy of the kernels beside other public implementations: ``pytest benchmarks``, or
``python -m benchmarks.run kernels`` where pytest-benchmark is not installed."""

import os

# torch reads it at its first allocation, so it has to be set here. Without it a CPU takes large tensors in pages of
# 4 KiB, and an implementation that holds gigabytes is timed on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
