"""One small file per host library, under the names and with the meanings of the host; import the one you need.

Each has ``use()``, which puts this library's function where the host looks its own up: for the rest of the process, or
for a ``with`` block.
"""
