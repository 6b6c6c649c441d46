"""What the integrations share: how to replace a function of a host library."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch


@dataclass(frozen=True)
class Replacement:
    """One name of a host, and what takes its place: the host's own must take the same parameters by position."""

    module: str  # dotted name of the host's module that defines the name
    name: str
    ours: Any


def replace(distribution: str, packages: Sequence[str], replacements: Sequence[Replacement]) -> ExitStack:
    """Set every replacement in all modules of ``packages`` that hold the host's own; closing the result undoes it.

    This covers modules that import the name later too, and those that did so in between. Nothing is changed unless
    every name is where it is expected and takes the expected parameters.

    Raises:
        ImportError: the host is not installed, or its version keeps a name elsewhere or with other parameters.
    """
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ImportError(f"use() needs {distribution}, which is not installed: pip install {distribution}") from None
    found = [(entry, _find(f"{distribution} {version}", entry)) for entry in replacements]
    stack = ExitStack()
    for entry, theirs in found:
        stack.callback(_swap, packages, entry.name, entry.ours, theirs)
        _swap(packages, entry.name, theirs, entry.ours)
    return stack


def with_backend(module: type[torch.nn.Module], backend: str) -> type[torch.nn.Module]:
    """A subclass of ``module`` that is built with this ``backend``."""
    init = functools.partialmethod(module.__init__, backend=backend)
    return type(module.__name__, (module,), {"__init__": init, "__module__": module.__module__})


def _find(host: str, entry: Replacement) -> Any:
    where = f"{entry.module}.{entry.name}"
    try:
        theirs = getattr(importlib.import_module(entry.module), entry.name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"{host} has no {where} ({error}): install a version that has, or call "
            "the function of videor1_kernels.integrations in your own code instead of use()"
        ) from error
    parameters, expected = _parameters(theirs), _parameters(entry.ours)
    if parameters != expected:
        raise ImportError(
            f"{where} of {host} takes ({', '.join(parameters)}), expected ({', '.join(expected)}): install a version "
            "that takes these, or call the function of videor1_kernels.integrations in your own code instead of use()"
        )
    return theirs


def _parameters(function: Any) -> list[str]:
    """The names that a caller can pass by position to a function, a class, an autograd Function or an ``apply``."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return list(inspect.signature(owner.forward).parameters)[1:]  # without ctx
    if not isinstance(function, type):
        function = getattr(function, "apply", function)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


def _swap(packages: Sequence[str], name: str, old: Any, new: Any) -> None:
    for module_name, module in list(sys.modules.items()):
        # vars, not getattr: a lazy package would import the whole host to answer.
        if module_name.partition(".")[0] in packages and vars(module).get(name) is old:
            setattr(module, name, new)
