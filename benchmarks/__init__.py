"""Speed, memory and accuracy of the kernels beside other public implementations: ``pytest benchmarks``, or
``python -m benchmarks.run kernels`` where pytest-benchmark is not installed."""
