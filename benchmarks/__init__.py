"""Speed, memory and accuracy beside other public implementations: ``pytest benchmarks``, or ``python -m benchmarks.run
PART`` where pytest-benchmark is not installed. A file bench_<name>.py holds cases and what is measured in them, run.py
runs them, options.py has the options, record.py writes the runs and report.py the tables."""

import os

# torch reads it at its first allocation, so it has to be set here. Without it a CPU takes large tensors in pages of
# 4 KiB, and an implementation that holds gigabytes is timed on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
