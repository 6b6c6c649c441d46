"""Kernel speed: ``pytest benchmarks``."""

import os

# torch reads it at its first allocation, so it has to be here. Without it a CPU takes large tensors in pages of 4 KiB:
# who holds gigabytes would be timed on page faults, a third of the repeated rows' step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
