"""Stand-ins for host libraries that need not be installed, and what their functions take."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


def set_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """What use() believes that the installed host is."""
    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", lambda name: version)


def fake_host(monkeypatch: pytest.MonkeyPatch, version: str, *names: str) -> list[Any]:
    """Modules of these dotted names, importable, in packages without content."""
    set_version(monkeypatch, version)
    modules: dict[str, Any] = {}
    for leaf in names:
        parts = leaf.split(".")
        for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
            modules[name] = modules.get(name) or types.ModuleType(name)
            modules[name].__path__ = []
            monkeypatch.setitem(sys.modules, name, modules[name])
    return [modules[name] for name in names]


def positional(function: Callable[..., Any]) -> str:
    """Names and defaults of what can be passed by position."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters if p.kind != p.KEYWORD_ONLY]
    return str(inspect.Signature(bare))
