"""One small file per host library, under the names and with the meanings of the host; import the one you need.

trl, liger, verl and openrlhf have ``use()``, which puts this library's function where the host looks its own up, for
the rest of the process or for a ``with`` block. transformers has ``register()``.
"""
