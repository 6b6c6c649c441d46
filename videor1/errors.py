"""Errors that are the user's to mend: shown as one message, without a traceback, by the commands."""


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot work."""


class DataError(ValueError):
    """A data file that cannot be used at all (a single bad sample is a ``types.SampleError``)."""


class TrainingStopped(RuntimeError):
    """Training cannot go on: too many non-finite steps in a row, or no usable sample left."""


def install(extra: str) -> str:
    """The command that adds an optional extra. No package index has this project: it is installed from a clone."""
    return f'pip install -e ".[{extra}]" (in the clone)'
