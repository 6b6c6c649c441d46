"""One small file per host library, with the host's own names and their meanings; import the one you need.

trl, liger, verl and openrlhf have ``use()``, which replaces the host's function by that of this library, for the rest
of the process or for a ``with`` block. transformers has ``register()``.
"""
