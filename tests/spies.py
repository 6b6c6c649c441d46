"""Functions that a test looks into, or puts something around."""

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """From now on a call of the function is ``around(function, *arguments, **keywords)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **keywords: around(original, *arguments, **keywords))


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """``note(result, *arguments, **keywords)`` of every call of the function from now on."""
    noted: list[Any] = []

    def around(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        noted.append(note(result, *arguments, **keywords))
        return result

    wrap(patch, owner, name, around)
    return noted


class Calls(TorchDispatchMode):
    """Keeps the names of the operations that are called, and what varlen_attn was given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.varlen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if "_varlen_attn" in str(func):
            self.varlen.append(args)
        return func(*args, **(kwargs or {}))
